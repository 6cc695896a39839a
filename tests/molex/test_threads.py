from __future__ import annotations

import os
import subprocess
import sys

# In a process of its own, which may use two threads. It counts the threads that the system sees.
PROGRAM = """
import os, threading, torch
from molex.threads import release_helpers
def count():
    return len(os.listdir("/proc/self/task"))
def compute():
    torch.randn(500, 500) @ torch.randn(500, 500)
    computing = count()
    assert release_helpers()
    return computing, count()
print(*compute())
print(*compute())
"""


def test_helpers_go_and_come_back():
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, check=True, text=True, env=environment
    )
    rounds = [[int(n) for n in line.split()] for line in result.stdout.splitlines()]
    assert [computing - after for computing, after in rounds] == [1, 1]
