from __future__ import annotations

import asyncio

from server.catalogue.catalogue import Catalogue
from server.catalogue.changes import Changes
from server.errors import ErrorKind, ServiceError
from tests.server.conftest import PEPPER


def test_who_listens_hears_of_every_change_once_and_of_none_before_the_start(using, url, monkeypatch):
    monkeypatch.setattr("server.catalogue.changes.REFRESH_ENTRIES", 2)

    async def work(catalogue):
        await catalogue.set_tenant("before", {}, actor="test")
        changes = Changes(catalogue)
        heard: list[str] = []
        changes.listeners.append(heard.append)
        await changes.start()
        elsewhere = Catalogue(url, PEPPER)
        for name in "abc":
            await elsewhere.set_tenant(name, {}, actor="test")
        await elsewhere.close()
        for _ in range(2):
            await changes.refresh()
        return heard

    assert using(work) == ["tenant:a", "tenant:b", "tenant:c"]


def test_a_database_that_was_down_is_watched_again(using, monkeypatch, caplog):
    monkeypatch.setattr("server.catalogue.changes.REFRESH_SECONDS", 0)

    async def work(catalogue):
        entries, failures = catalogue.entries, iter(range(3))

        async def flaky(after, limit):
            if next(failures, None) is not None:
                raise ServiceError(ErrorKind.CATALOGUE_DOWN, "down")
            return await entries(after, limit)

        monkeypatch.setattr(catalogue, "entries", flaky)
        changes = Changes(catalogue)
        heard: asyncio.Queue[str] = asyncio.Queue()
        changes.listeners.append(heard.put_nowait)
        await catalogue.set_tenant("acme", {}, actor="test")
        watch = asyncio.create_task(changes.watch())
        subject = await asyncio.wait_for(heard.get(), 60)
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        return subject

    assert using(work) == "tenant:acme"
    assert len(caplog.records) == 1


def test_an_error_ends_no_watch(using, monkeypatch, caplog):
    monkeypatch.setattr("server.catalogue.changes.REFRESH_SECONDS", 0)

    async def work(catalogue):
        changes = Changes(catalogue)
        heard: asyncio.Queue[str] = asyncio.Queue()
        failures = iter(range(1))

        def listener(subject):
            if next(failures, None) is not None:
                raise KeyError(subject)
            heard.put_nowait(subject)

        changes.listeners.append(listener)
        await catalogue.set_tenant("acme", {}, actor="test")
        watch = asyncio.create_task(changes.watch())
        subject = await asyncio.wait_for(heard.get(), 60)
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        return subject

    assert using(work) == "tenant:acme"
    assert [record.message for record in caplog.records] == [
        "a change of the catalogue could not be followed"
    ]
