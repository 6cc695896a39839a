from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

from server.catalogue.catalogue import Catalogue
from tests.server.conftest import PEPPER

T = TypeVar("T")


@pytest.fixture
def using(url, clock) -> Callable[[Callable[[Catalogue], Coroutine[Any, Any, T]]], T]:
    """Runs a coroutine function on a catalogue that is closed afterwards."""

    def run(work: Callable[[Catalogue], Coroutine[Any, Any, T]]) -> T:
        async def scoped() -> T:
            catalogue = Catalogue(url, PEPPER, clock)
            try:
                return await work(catalogue)
            finally:
                await catalogue.close()

        return asyncio.run(scoped())

    return run
