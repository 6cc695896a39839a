from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest

from server.auth.caller import ANYONE, Caller
from server.auth.quotas import Quotas
from server.catalogue.records import Quota
from server.errors import ErrorKind, ServiceError


@pytest.fixture
def clock(clock, monkeypatch):
    monkeypatch.setattr("time.time", clock)
    return clock


def caller(tenant: str = "acme", **quota: int) -> Caller:
    return Caller(tenant, "0" * 16, frozenset(), Quota(**quota))


async def ask(quotas: Quotas, who: Caller, times: int = 1) -> ServiceError | None:
    try:
        for _ in range(times):
            with ExitStack() as ending:
                await quotas.begin(who, ending)
    except ServiceError as error:
        return error
    return None


@pytest.mark.parametrize("phase", [0, 1, 29.5, 59.9])
@pytest.mark.parametrize("pause", [0, 20, 45])
def test_requests_beyond_the_limit_wait_as_long_as_they_are_told(clock, phase, pause):
    async def work():
        clock.now += phase
        quotas, who = Quotas(), caller(requests_per_minute=5)
        assert await ask(quotas, who, 3) is None
        clock.now += pause
        # More may fit than was left: what was asked before has begun to fade.
        refused = next(error for error in [await ask(quotas, who) for _ in range(6)] if error)
        other = await ask(quotas, caller("other", requests_per_minute=5), 5)
        clock.now += int(refused.headers["retry-after"])
        return refused, other, await ask(quotas, who)

    refused, other, later = asyncio.run(work())
    assert refused.kind is ErrorKind.QUOTA
    assert 1 <= int(refused.headers["retry-after"]) <= 120
    assert other is later is None


def test_a_tenant_without_requests_is_refused(clock):
    refused = asyncio.run(ask(Quotas(), caller(requests_per_minute=0)))
    assert refused is not None
    assert refused.kind is ErrorKind.QUOTA


def test_requests_under_way_are_counted_and_given_back():
    async def work():
        quotas, who = Quotas(), caller(concurrency=2)
        with ExitStack() as ending:
            await quotas.begin(who, ending)
            await quotas.begin(who, ending)
            refused = await ask(quotas, who)
            other = await ask(quotas, caller("other", concurrency=2))
        return refused, other, await ask(quotas, who)

    refused, other, later = asyncio.run(work())
    assert refused.headers == {"retry-after": "1"}
    assert other is later is None


def test_a_request_refused_by_its_rate_is_not_under_way(clock):
    async def work():
        quotas, who = Quotas(), caller(concurrency=1, requests_per_minute=1)
        first = await ask(quotas, who)
        refusals = [await ask(quotas, who) for _ in range(3)]
        return first, {error.message for error in refusals}

    first, messages = asyncio.run(work())
    assert first is None
    assert messages == {"acme has used its 1 requests a minute"}


def test_tokens_are_spent_and_one_request_cannot_need_more_than_all(clock):
    async def work():
        quotas, who = Quotas(), caller(tokens_per_minute=100)
        await quotas.tokens(who, 60)
        with pytest.raises(ServiceError) as over:
            await quotas.tokens(who, 60)
        clock.now += int(over.value.headers["retry-after"])
        await quotas.tokens(who, 60)
        with pytest.raises(ServiceError) as never:
            await quotas.tokens(who, 101)
        await quotas.tokens(caller("other"), 10**9)
        await quotas.tokens(ANYONE, 10**9)
        return over.value.kind, never.value.kind

    assert asyncio.run(work()) == (ErrorKind.QUOTA, ErrorKind.INVALID_REQUEST)
