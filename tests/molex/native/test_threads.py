"""Threads of the kernels on CPUs of their own, in processes that end with the test."""

from __future__ import annotations

import os
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from molex.native.threads import spread_threads
from molex.native.vocabulary import NativeVocabulary
from molex.threads import release_helpers
from tests.forks import run_apart
from tests.molex.native.kernels import needs_kernels

pytestmark = needs_kernels


def places_of_threads() -> Counter[frozenset[int]]:
    """How many threads of this process may run where."""
    places: Counter[frozenset[int]] = Counter()
    for task in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # It has ended meanwhile.
            places[frozenset(os.sched_getaffinity(int(task.name)))] += 1
    return places


def wait_for_helpers_to_end(caller: frozenset[int]) -> None:
    deadline = time.monotonic() + 10
    while any(len(place) == 1 and place != caller for place in places_of_threads()):
        assert time.monotonic() < deadline, "helpers are left"
        os.sched_yield()


def computing_places() -> list[Counter[frozenset[int]]]:
    """Where the threads of a process may run, after it has computed and once more with new helpers."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    vocabulary = NativeVocabulary(nn.Linear(8, 64))
    assert spread_threads()
    places = []
    for _ in range(2):
        vocabulary(torch.zeros(1, 8))
        places.append(places_of_threads())
        release_helpers()
        wait_for_helpers_to_end(frozenset(os.sched_getaffinity(0)))
    return places


def spread_with(threads: int, **environment: str) -> bool:
    NativeVocabulary(nn.Linear(8, 64))
    torch.set_num_threads(threads)
    os.environ.update(environment)
    return spread_threads()


def test_each_thread_has_a_cpu_of_its_own():
    cpus = os.sched_getaffinity(0)
    for places in run_apart(computing_places):
        assert all(places[frozenset({cpu})] >= 1 for cpu in cpus)


def test_another_number_of_threads_than_cpus_is_left_to_the_system():
    assert not run_apart(spread_with, len(os.sched_getaffinity(0)) + 1)


def test_who_has_bound_threads_already_has_chosen():
    assert not run_apart(spread_with, len(os.sched_getaffinity(0)), OMP_PROC_BIND="false")
