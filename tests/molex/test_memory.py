from __future__ import annotations

import subprocess
import sys

# In a process of its own: the setting is for the whole process. The second pass over the same sizes must
# find its pages where the first one left them. Blocks are of more than 32 MB: below that, glibc may decide by
# itself to keep some.
PROGRAM = """
import resource, sys, torch
from molex.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        blocks = [torch.ones(10_000_000) for _ in range(2)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def page_faults(mode):
    result = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, check=True, text=True)
    return int(result.stdout)


def test_pages_are_kept_from_pass_to_pass():
    assert page_faults("keep") < page_faults("default")
