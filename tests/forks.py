"""Processes that begin where the imports are done, which are most of what a short process does.

They are forks of one process that has imported the server, computed nothing and started no thread; nothing of
the process of the tests is in them. How Python itself begins and ends is for tests that begin one.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import ParamSpec, TypeVar

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["server.cli", "pytest"])

P = ParamSpec("P")
R = TypeVar("R")


def run_apart(function: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
    """Call a function of a module in a process that ends with it."""
    with ProcessPoolExecutor(1, FORKS) as pool:
        return pool.submit(function, *arguments, **options).result()
