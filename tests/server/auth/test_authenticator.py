from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from server.auth.authenticator import CACHED_KEYS, RECORDED_REFUSALS, Authenticator
from server.catalogue.catalogue import Catalogue
from server.catalogue.changes import Changes
from server.catalogue.records import Quota, Scope
from server.catalogue.url import parse_url
from server.errors import ErrorKind, ServiceError
from tests.server.conftest import PEPPER

INFER = frozenset({Scope.INFER})
Work = Callable[[Catalogue, Authenticator], Coroutine[Any, Any, Any]]


@pytest.fixture
def scene(url, clock):
    """Runs a coroutine function on a catalogue with a tenant and an authenticator."""

    def run(work: Work) -> Any:
        async def scoped() -> Any:
            catalogue = Catalogue(url, PEPPER, clock)
            try:
                await catalogue.set_tenant("acme", {"concurrency": 2}, actor="test")
                authenticator = Authenticator(catalogue, clock)
                return await work(catalogue, authenticator)
            finally:
                await catalogue.close()

        return asyncio.run(scoped())

    return run


async def refusal(authenticator: Authenticator, header: str | None) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        await authenticator.identify(header)
    return caught.value


async def queries(catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids that are looked up from now on."""
    asked: list[str] = []
    find = catalogue.find_key

    async def counted(key_id: str) -> Any:
        asked.append(key_id)
        return await find(key_id)

    monkeypatch.setattr(catalogue, "find_key", counted)
    return asked


def test_a_key_tells_its_tenant_scopes_and_quota(scene):
    async def work(catalogue, authenticator):
        key, token = await catalogue.create_key("acme", INFER, actor="test")
        callers = [await authenticator.identify(f"{word} {token}") for word in ("Bearer", "bearer")]
        return key, callers

    key, callers = scene(work)
    for caller in callers:
        assert (caller.tenant, caller.key_id, caller.scopes) == ("acme", key.id, INFER)
        assert caller.quota == Quota(concurrency=2)


def test_bad_keys_are_401_and_say_how(scene, clock):
    async def work(catalogue, authenticator):
        _, token = await catalogue.create_key("acme", INFER, actor="test", expires=int(clock.now) + 10)
        other, _ = await catalogue.create_key("acme", INFER, actor="test")
        wrong = token[:-4] + ("aaaa" if token[-4:] != "aaaa" else "bbbb")
        borrowed = token.replace(token.split("_")[1], other.id)
        headers = [None, "", "Basic eDp5", "Bearer", "Bearer x", f"Bearer {wrong}", f"Bearer {borrowed}"]
        errors = [await refusal(authenticator, header) for header in headers]
        clock.now += 10
        return errors, await refusal(authenticator, f"Bearer {token}")

    errors, expired = scene(work)
    assert [error.kind for error in errors] == [ErrorKind.NO_KEY] + [ErrorKind.BAD_KEY] * 6
    assert {error.message for error in errors[1:]} == {"the API key is not valid"}
    assert expired.message == "the API key is expired"
    assert all(error.headers == {"www-authenticate": "Bearer"} for error in [*errors, expired])


def test_both_keys_of_a_rotation_are_good_until_the_first_is_revoked(scene):
    async def work(catalogue, authenticator):
        made = [await catalogue.create_key("acme", INFER, actor="test", name="web") for _ in range(2)]
        (first, old), (second, new) = made
        callers = [await authenticator.identify(f"Bearer {token}") for token in (old, new)]
        await catalogue.revoke(first.id, actor="test")
        authenticator.forget(f"key:{first.id}")
        refused = await refusal(authenticator, f"Bearer {old}")
        callers.append(await authenticator.identify(f"Bearer {new}"))
        return refused, [caller.key_id for caller in callers], [first.id, second.id, second.id]

    refused, known, expected = scene(work)
    assert refused.message == "the API key is revoked"
    assert known == expected


def test_a_key_in_memory_expires(scene, clock):
    async def work(catalogue, authenticator):
        _, token = await catalogue.create_key("acme", INFER, actor="test", expires=int(clock.now) + 10)
        clock.now += 9
        await authenticator.identify(f"Bearer {token}")
        clock.now += 1
        return await refusal(authenticator, f"Bearer {token}")

    assert scene(work).message == "the API key is expired"


def test_a_key_in_use_costs_no_query(scene, monkeypatch):
    async def work(catalogue, authenticator):
        _, token = await catalogue.create_key("acme", INFER, actor="test")
        asked = await queries(catalogue, monkeypatch)
        for _ in range(3):
            await authenticator.identify(f"Bearer {token}")
        return asked

    assert len(scene(work)) == 1


def test_the_keys_in_memory_are_bounded(scene, monkeypatch):
    monkeypatch.setattr("server.auth.authenticator.CACHED_KEYS", 2)

    async def work(catalogue, authenticator):
        made = [await catalogue.create_key("acme", INFER, actor="test", name=name) for name in "abc"]
        for _, token in made:
            await authenticator.identify(f"Bearer {token}")
        return [key.id for key, _ in made], list(authenticator._cache)

    ids, cached = scene(work)
    assert cached == ids[1:]
    assert CACHED_KEYS > 1000


def test_a_revocation_here_counts_at_once(scene):
    async def work(catalogue, authenticator):
        key, token = await catalogue.create_key("acme", INFER, actor="test")
        await authenticator.identify(f"Bearer {token}")
        await catalogue.revoke(key.id, actor="test")
        authenticator.forget(f"key:{key.id}")
        return await refusal(authenticator, f"Bearer {token}")

    assert scene(work).message == "the API key is revoked"


def test_a_revocation_elsewhere_counts_after_a_refresh(scene, url, clock):
    async def work(catalogue, authenticator):
        key, token = await catalogue.create_key("acme", INFER, actor="test")
        await authenticator.identify(f"Bearer {token}")
        changes = Changes(catalogue)
        changes.listeners.append(authenticator.forget)
        await changes.start()
        elsewhere = Catalogue(url, PEPPER, clock)
        await elsewhere.revoke(key.id, actor="test")
        await elsewhere.close()
        await changes.refresh()
        return await refusal(authenticator, f"Bearer {token}")

    assert scene(work).message == "the API key is revoked"


def test_a_changed_limit_counts_once_the_tenant_is_forgotten(scene):
    async def work(catalogue, authenticator):
        _, token = await catalogue.create_key("acme", INFER, actor="test")
        await authenticator.identify(f"Bearer {token}")
        await catalogue.set_tenant("acme", {"concurrency": 9}, actor="test")
        authenticator.forget("tenant:acme")
        return await authenticator.identify(f"Bearer {token}")

    assert scene(work).quota.concurrency == 9


def test_a_look_up_under_way_does_not_bring_a_revoked_key_back(scene, monkeypatch):
    async def work(catalogue, authenticator):
        _, token = await catalogue.create_key("acme", INFER, actor="test")
        find = catalogue.find_key

        async def overtaken(key_id: str) -> Any:
            found = await find(key_id)
            await catalogue.revoke(key_id, actor="test")
            authenticator.forget(f"key:{key_id}")
            return found

        monkeypatch.setattr(catalogue, "find_key", overtaken)
        await authenticator.identify(f"Bearer {token}")
        monkeypatch.undo()
        return await refusal(authenticator, f"Bearer {token}")

    assert scene(work).message == "the API key is revoked"


def test_while_the_database_is_down_known_keys_stay_good(scene, monkeypatch):
    async def work(catalogue, authenticator):
        _, known = await catalogue.create_key("acme", INFER, actor="test")
        _, unknown = await catalogue.create_key("acme", INFER, actor="test")
        await authenticator.identify(f"Bearer {known}")
        down = Catalogue(parse_url("postgresql://molex@127.0.0.1:1/none"), PEPPER)
        for name in ("find_key", "record"):
            monkeypatch.setattr(catalogue, name, getattr(down, name))
        caller = await authenticator.identify(f"Bearer {known}")
        wrong = await refusal(authenticator, f"Bearer {known[:-4]}zzzz")
        new = await refusal(authenticator, f"Bearer {unknown}")
        await down.close()
        return caller, wrong, new

    caller, wrong, new = scene(work)
    assert caller.tenant == "acme"
    assert wrong.kind is ErrorKind.BAD_KEY
    assert new.kind is ErrorKind.CATALOGUE_DOWN


def test_refused_keys_are_recorded_up_to_a_bound(scene, clock, monkeypatch):
    monkeypatch.setattr("time.time", clock)

    async def work(catalogue, authenticator):
        before = await catalogue.last_entry()
        for _ in range(RECORDED_REFUSALS.amount + 5):
            await refusal(authenticator, "Bearer molex_0123456789abcdef_" + "x" * 43)
        clock.now += 61
        await refusal(authenticator, "Bearer nonsense")
        return await catalogue.entries(before)

    entries = scene(work)
    assert len(entries) == RECORDED_REFUSALS.amount + 1
    assert {entry.action for entry in entries} == {"login.refused"}
    assert entries[0].subject == "key:0123456789abcdef"
    assert entries[-1].subject == "key:unknown"
    assert json.loads(entries[-1].detail)["unrecorded_before"] == 5
