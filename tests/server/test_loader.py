"""Requests that name evicted adapters, on an event loop without a server."""

from __future__ import annotations

import asyncio
from threading import Event

import pytest

from molex.adapter import BARE
from server import loader as loader_module
from server.adapters import AdapterStore
from server.errors import ErrorKind, ServiceError
from server.loader import Loader
from server.metrics import Metrics

NAMES = ("mood", "topic", "rank2", "judge")


@pytest.fixture
def store(models, settings, adapters_folder):
    """One place in memory, which `judge` has; the others are registered."""
    settings = settings.model_copy(update={"max_resident_adapters": 1})
    store = AdapterStore(models, settings, Metrics())
    for name in NAMES:
        store.load(name, adapters_folder / name)
    return store


@pytest.fixture
def reads(store, monkeypatch):
    """The names that are read, in order; `reads.go` holds the reads until it is set."""

    class Reads(list[str]):
        go = Event()

    reads, read_again = Reads(), store.read_again

    def counted(served):
        reads.append(served.name)
        assert reads.go.wait(60)
        return read_again(served)

    monkeypatch.setattr(store, "read_again", counted)
    yield reads
    reads.go.set()


def run(store, work):
    """Call `work` with a loader on an event loop."""

    async def main():
        loader = Loader(store, Metrics(), threads=2)
        try:
            return await work(loader)
        finally:
            loader.close()

    return asyncio.run(main())


async def load(loader, store, name):
    return await asyncio.shield(loader.begin(store.get(name)))


def test_what_is_in_memory_needs_no_read(store, reads):
    async def work(loader):
        assert await loader.begin(None) is BARE
        assert await loader.begin(store.get("judge")) is store.weights(store.get("judge"))

    run(store, work)
    assert reads == []


def test_one_read_serves_all_who_ask_at_once(store, reads):
    async def work(loader):
        asking = [asyncio.ensure_future(load(loader, store, "mood")) for _ in range(32)]
        await asyncio.sleep(0)
        reads.go.set()
        return await asyncio.gather(*asking)

    weights = run(store, work)
    assert reads == ["mood"]
    assert {id(adapter) for adapter in weights} == {id(store.weights(store.get("mood")))}


def test_a_load_goes_on_for_the_others_when_one_gives_up(store, reads):
    async def work(loader):
        first, second = (asyncio.ensure_future(load(loader, store, "mood")) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        reads.go.set()
        return (await second).digest

    assert run(store, work) == store.get("mood").digest


def test_a_failure_reaches_all_who_ask_and_is_tried_again_later(store, reads, monkeypatch):
    reads.go.set()
    read_again = store.read_again

    def fail(served):
        store._residents.discard(served)
        raise ServiceError(ErrorKind.ADAPTER_UNAVAILABLE, "gone")

    async def work(loader):
        monkeypatch.setattr(store, "read_again", fail)
        asking = [load(loader, store, "mood") for _ in range(3)]
        failures = await asyncio.gather(*asking, return_exceptions=True)
        assert [failure.message for failure in failures] == ["gone"] * 3
        monkeypatch.setattr(store, "read_again", read_again)
        return await load(loader, store, "mood")

    assert run(store, work).digest == store.get("mood").digest


def test_loads_wait_for_room_in_the_order_they_came(store, reads):
    free = Event()

    def in_use():
        return set() if free.is_set() else {store.weights(store.get(name)) for name in NAMES} - {None}

    store.watch_use(in_use)

    async def work(loader):
        first = asyncio.ensure_future(load(loader, store, "mood"))
        second = asyncio.ensure_future(load(loader, store, "topic"))
        await asyncio.sleep(0)
        assert reads == []
        free.set()
        while not reads:
            await asyncio.sleep(0)
        free.clear()
        reads.go.set()
        await first
        assert reads == ["mood"]
        free.set()
        await second

    run(store, work)
    assert reads == ["mood", "topic"]


def test_a_load_that_finds_no_room_in_time_is_refused(store, reads, monkeypatch):
    monkeypatch.setattr(loader_module, "ROOM_SECONDS", 0)
    held = {store.weights(store.get("judge"))}
    store.watch_use(lambda: held)
    with pytest.raises(ServiceError, match="no room in memory for the adapter 'mood'") as caught:
        run(store, lambda loader: load(loader, store, "mood"))
    assert (caught.value.kind, caught.value.retry_after) == (ErrorKind.OVERLOADED, 1)
    assert reads == []
