from __future__ import annotations

from pathlib import Path

import torch

from molex.threads import release_helpers
from tests.forks import run_apart


def threads_around_a_release() -> list[tuple[int, int]]:
    """The threads that the system sees while this process computes, and after; two rounds of that."""
    torch.set_num_threads(2)
    return [compute_and_release() for _ in range(2)]


def compute_and_release() -> tuple[int, int]:
    torch.randn(500, 500) @ torch.randn(500, 500)
    computing = count()
    assert release_helpers()
    return computing, count()


def count() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_helpers_go_and_come_back():
    # In a process of its own, which may use two threads.
    rounds = run_apart(threads_around_a_release)
    assert [computing - after for computing, after in rounds] == [1, 1]
