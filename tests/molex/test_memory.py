from __future__ import annotations

import os
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


# A second pass over more sizes than oneDNN keeps by default; it reports each kernel that it compiles.
KERNELS = """
import sys, torch
from molex.memory import keep_compiled_kernels
from molex.prepack import PrepackedLinear
if sys.argv[1] == "keep":
    keep_compiled_kernels()
layer = PrepackedLinear(torch.nn.Linear(4, 4))
with torch.inference_mode():
    for passes in range(2):
        print("pass", passes, flush=True)
        for rows in range(1, 1100):
            layer(torch.zeros(rows, 4))
"""


def output(program, mode, **environment):
    return subprocess.run(
        [sys.executable, "-c", program, mode],
        capture_output=True,
        check=True,
        text=True,
        env=os.environ | environment,
    ).stdout


def page_faults(mode):
    return int(output(PROGRAM, mode))


def compiled_again(mode):
    first, second = output(KERNELS, mode, ONEDNN_VERBOSE="profile_create").split("pass 1")
    assert first.count("create:cache_miss") >= 1099
    return second.count("create:cache_miss")


def test_kernels_are_kept_from_pass_to_pass():
    assert compiled_again("default") > 0
    assert compiled_again("keep") == 0


def test_pages_are_kept_from_pass_to_pass():
    assert page_faults("keep") < page_faults("default")
