from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from molex.threads import release_helpers
from tests.forks import run_apart


def computing_threads() -> list[int]:
    """The threads that the system sees while this process computes; two rounds, with a release after each."""
    torch.set_num_threads(2)
    return [compute_and_release() for _ in range(2)]


def compute_and_release() -> int:
    torch.randn(500, 500) @ torch.randn(500, 500)
    computing = count()
    assert release_helpers()
    wait_for_one_less(computing)
    return computing


def wait_for_one_less(threads: int) -> None:
    # A thread that has been joined can still be listed for a moment.
    deadline = time.monotonic() + 10
    while count() != threads - 1:
        assert time.monotonic() < deadline, f"{count()} threads of {threads} are left"
        os.sched_yield()


def count() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_helpers_go_and_come_back():
    # In a process of its own, which may use two threads.
    first, second = run_apart(computing_threads)
    assert first == second
