from __future__ import annotations

import asyncio
import json

import pytest
import sqlalchemy as sa

from server.catalogue.catalogue import Catalogue
from server.catalogue.records import Quota, Scope
from server.errors import ErrorKind, ServiceError
from tests.server.conftest import PEPPER

INFER = frozenset({Scope.INFER})


async def with_tenant(catalogue: Catalogue) -> None:
    await catalogue.set_tenant("acme", {}, actor="test")


def test_a_tenant_is_created_then_changed_limit_by_limit(using):
    async def work(catalogue):
        made = await catalogue.set_tenant("acme", {"concurrency": 3}, actor="test")
        changed = await catalogue.set_tenant("acme", {"tokens_per_minute": 2**40}, actor="test")
        lifted = await catalogue.set_tenant("acme", {"concurrency": None}, actor="test")
        return made, changed, lifted, await catalogue.tenants()

    made, changed, lifted, listed = using(work)
    assert made.quota == Quota(concurrency=3)
    assert changed.quota == Quota(concurrency=3, tokens_per_minute=2**40)
    assert lifted.quota == Quota(tokens_per_minute=2**40)
    assert listed == [lifted]


def test_a_key_is_found_by_its_id_and_known_by_its_secret_alone(using):
    async def work(catalogue):
        await with_tenant(catalogue)
        key, token = await catalogue.create_key("acme", INFER, actor="test")
        return catalogue, key, token, await catalogue.find_key(key.id)

    catalogue, key, token, found = using(work)
    assert found is not None
    assert found[0] == key
    assert found[1].name == "acme"
    assert catalogue.is_secret(token, key)
    assert not catalogue.is_secret(token[:-1] + ("a" if token[-1] != "a" else "b"), key)


def test_the_secret_is_nowhere_in_the_database(using, url):
    async def work(catalogue):
        await with_tenant(catalogue)
        _, token = await catalogue.create_key("acme", INFER, actor="test")
        with catalogue.transactions._engine.connect() as connection:
            rows = [
                str(connection.execute(sa.text(f"SELECT * FROM {table}")).all())
                for table in ("api_keys", "audit_entries", "tenants")
            ]
        return token, rows

    token, rows = using(work)
    secret = token.split("_", 2)[2]
    assert secret not in "".join(rows)
    assert PEPPER not in "".join(rows)


def test_two_keys_of_a_name_may_live_and_no_third(using, clock):
    async def work(catalogue):
        await with_tenant(catalogue)
        first, _ = await catalogue.create_key("acme", INFER, actor="test", expires=int(clock.now) + 10)
        second, _ = await catalogue.create_key("acme", INFER, actor="test")
        await catalogue.create_key("acme", INFER, actor="test", name="other")
        with pytest.raises(ServiceError) as caught:
            await catalogue.create_key("acme", INFER, actor="test")
        clock.now += 10
        third, _ = await catalogue.create_key("acme", INFER, actor="test")
        await catalogue.revoke(second.id, actor="test")
        await catalogue.create_key("acme", INFER, actor="test")
        states = {key.id: key.state(clock.now) for key in await catalogue.keys("acme")}
        return caught.value, (first.id, second.id, third.id), states

    refused, (first, second, third), states = using(work)
    assert refused.kind is ErrorKind.TOO_MANY_KEYS
    assert first in refused.message
    assert (states[first], states[second], states[third]) == ("expired", "revoked", "live")
    assert len(states) == 5


def test_revoking_lasts_and_is_recorded_once(using, clock):
    async def work(catalogue):
        await with_tenant(catalogue)
        key, _ = await catalogue.create_key("acme", INFER, actor="test")
        first = await catalogue.revoke(key.id, actor="test")
        clock.now += 5
        again = await catalogue.revoke(key.id, actor="test")
        return first, again, [entry.action for entry in await catalogue.entries()]

    first, again, actions = using(work)
    assert first == again
    assert first.revoked is not None
    assert actions == ["tenant.create", "key.create", "key.revoke"]


@pytest.mark.parametrize(
    ("arguments", "kind", "param"),
    [
        ({"tenant": "nobody"}, ErrorKind.TENANT_NOT_FOUND, "tenant"),
        # PostgreSQL takes no such text, and SQLite does.
        ({"tenant": "a\0"}, ErrorKind.INVALID_REQUEST, "tenant"),
        ({"scopes": frozenset()}, ErrorKind.INVALID_REQUEST, "scopes"),
        ({"expires": 1}, ErrorKind.INVALID_REQUEST, "expires"),
        ({"name": "A B"}, ErrorKind.INVALID_REQUEST, "name"),
    ],
)
def test_keys_that_make_no_sense_are_refused_by_field(using, arguments, kind, param):
    async def work(catalogue):
        await with_tenant(catalogue)
        before = await catalogue.last_entry()
        with pytest.raises(ServiceError) as caught:
            await catalogue.create_key(**{"tenant": "acme", "scopes": INFER, "actor": "test"} | arguments)
        return caught.value, await catalogue.last_entry() - before

    error, written = using(work)
    assert (error.kind, error.param, written) == (kind, param, 0)


@pytest.mark.parametrize("name", ["", "Acme", "a/b", "..", "a b", "x" * 64, "é"])
def test_names_of_tenants_are_safe_in_paths(using, name):
    with pytest.raises(ServiceError, match="is no name"):
        using(lambda catalogue: catalogue.set_tenant(name, {}, actor="test"))


@pytest.mark.parametrize("key_id", ["0" * 16, "nobody", "\0"])
def test_an_unknown_key_is_404(using, key_id):
    with pytest.raises(ServiceError) as caught:
        using(lambda catalogue: catalogue.revoke(key_id, actor="test"))
    assert caught.value.kind is ErrorKind.KEY_NOT_FOUND


def test_an_unknown_key_is_not_found(using):
    assert using(lambda catalogue: catalogue.find_key("0" * 16)) is None


def test_writers_side_by_side_make_one_chain(using, url, clock):
    async def work(catalogue):
        others = [Catalogue(url, PEPPER, clock) for _ in range(3)]
        await asyncio.gather(
            *(c.record("test", "a", f"x:{i}", {"i": i}) for i, c in enumerate([catalogue, *others] * 5))
        )
        for other in others:
            await other.close()
        return await catalogue.verify(), await catalogue.entries()

    (number, head, problem), entries = using(work)
    assert problem is None
    assert number == len(entries) == 20
    assert head == entries[-1].hash
    assert [entry.number for entry in entries] == list(range(1, 21))
    assert {json.loads(entry.detail)["i"] for entry in entries} == set(range(20))


def test_a_database_that_is_gone_is_503(tmp_path):
    from_nowhere = sa.make_url("postgresql://molex@127.0.0.1:1/none")

    async def work():
        catalogue = Catalogue(from_nowhere, PEPPER)
        try:
            await catalogue.keys()
        finally:
            await catalogue.close()

    with pytest.raises(ServiceError) as caught:
        asyncio.run(work())
    assert caught.value.kind is ErrorKind.CATALOGUE_DOWN
    assert "127.0.0.1" not in caught.value.message
