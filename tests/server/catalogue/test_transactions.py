from __future__ import annotations

import asyncio
from threading import Event

import pytest
import sqlalchemy as sa

from server.catalogue import transactions
from server.catalogue.tables import audit_head
from server.catalogue.transactions import Transactions
from server.errors import ErrorKind, ServiceError

MARK = "f" * 64
CHANGE = sa.update(audit_head).values(hash=MARK)


def head(connection: sa.Connection) -> str:
    return str(connection.execute(sa.select(audit_head.c.hash)).scalar_one())


def run(url, work):
    async def scoped():
        opened = Transactions(url)
        try:
            return await work(opened)
        finally:
            opened.close()

    return asyncio.run(scoped())


def test_a_transaction_that_fails_changes_nothing(url):
    def fail(connection: sa.Connection) -> None:
        connection.execute(CHANGE)
        raise KeyError("a test")

    async def work(opened):
        with pytest.raises(KeyError, match="a test"):
            await opened.write(fail)
        return await opened.read(head)

    assert run(url, work) != MARK


def test_who_is_cancelled_waits_until_the_transaction_has_ended(url):
    begun, go = Event(), Event()

    def change(connection: sa.Connection) -> None:
        connection.execute(CHANGE)
        begun.set()
        assert go.wait(60)

    async def work(opened):
        task = asyncio.create_task(opened.write(change))
        await asyncio.to_thread(begun.wait, 60)
        task.cancel()
        waited, _ = await asyncio.wait({task}, timeout=0.01)
        go.set()
        await asyncio.wait({task})
        return waited, task.cancelled(), await opened.read(head)

    assert run(url, work) == (set(), True, MARK)


def test_writers_take_turns_and_readers_wait_for_none(url):
    begun, go = Event(), Event()

    def hold(connection: sa.Connection) -> None:
        begun.set()
        assert go.wait(60)
        connection.execute(CHANGE)

    async def work(opened):
        first = asyncio.create_task(opened.write(hold))
        await asyncio.to_thread(begun.wait, 60)
        second = asyncio.create_task(opened.write(head))
        before = await opened.read(head)
        go.set()
        await first
        return before, await second

    before, after = run(url, work)
    assert (before, after) == ("0" * 64, MARK)


def test_a_writer_elsewhere_that_never_ends_is_not_waited_for_forever(url, monkeypatch):
    monkeypatch.setattr("server.catalogue.database.BUSY_SECONDS", 1)
    begun, go = Event(), Event()

    def hold(_: sa.Connection) -> None:
        begun.set()
        assert go.wait(60)

    async def work(opened):
        elsewhere = Transactions(url)
        holding = asyncio.create_task(elsewhere.write(hold))
        await asyncio.to_thread(begun.wait, 60)
        with pytest.raises(ServiceError) as caught:
            await opened.write(head)
        go.set()
        await holding
        elsewhere.close()
        return caught.value, await opened.write(head)

    error, after = run(url, work)
    assert error.kind is ErrorKind.CATALOGUE_DOWN
    assert error.retry_after
    assert len(after) == 64


def test_a_transaction_for_which_no_connection_is_left_in_time_is_refused(url, monkeypatch):
    monkeypatch.setattr(transactions, "TURN_SECONDS", 0)
    monkeypatch.setattr(transactions, "CONNECTIONS", 1)
    begun, go = Event(), Event()

    def hold(_: sa.Connection) -> None:
        begun.set()
        assert go.wait(60)

    async def work(opened):
        holding = asyncio.create_task(opened.read(hold))
        await asyncio.to_thread(begun.wait, 60)
        with pytest.raises(ServiceError, match="cannot be reached"):
            await opened.read(head)
        go.set()
        await holding

    run(url, work)
