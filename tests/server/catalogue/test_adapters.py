from __future__ import annotations

import json

import pytest

from server.catalogue.adapters import AdapterCatalogue
from server.catalogue.records import Facts
from server.errors import ErrorKind, ServiceError

NAME = "acme/mood"


def facts(digest: str, size: int = 10, base: str = "enc") -> Facts:
    return Facts(base, f"sha256:{digest}", size, "lora", "SEQ_CLS", {0: "bad", 1: "good"}, "{}")


@pytest.fixture
def using_adapters(using):
    """Runs a coroutine function on a catalogue of adapters with the tenant acme."""

    def run(work, **quota):
        async def scoped(catalogue):
            await catalogue.set_tenant("acme", quota, actor="test")
            return await work(AdapterCatalogue(catalogue), catalogue)

        return using(scoped)

    return run


async def registered(adapters, name=NAME, **changes):
    given = {"source": "folder", "base": None, "digest": None, "pinned": False, "actor": "test"}
    return await adapters.register(name, **given | changes)


async def loaded(adapters, *digests, name=NAME, size=10):
    """An adapter with a version for each digest."""
    for digest in digests:
        number = (await registered(adapters, name)).versions[-1].number
        record = await adapters.finish(name, number, "folder", facts(digest, size))
    return record


async def actions(catalogue):
    entries = [entry for entry in await catalogue.entries() if entry.subject == f"adapter:{NAME}"]
    return [(entry.action, json.loads(entry.detail)) for entry in entries]


def refusal(using_adapters, work, **quota) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        using_adapters(work, **quota)
    return caught.value


def test_a_version_goes_from_registered_to_ready(using_adapters, clock):
    async def work(adapters, catalogue):
        first = await registered(adapters, pinned=True)
        clock.now += 5
        finished = await adapters.finish(NAME, 1, "hf://org/repo@1", facts("a"))
        assert await adapters.all() == [finished]
        assert await adapters.find(NAME) == finished
        return first, finished, await actions(catalogue)

    first, finished, told = using_adapters(work)
    assert [r.versions[0].state for r in (first, finished)] == ["registered", "ready"]
    assert (first.current, finished.current) == (None, 1)
    assert first.versions[0].under_way
    version = finished.versions[0]
    assert version.facts == facts("a")
    assert (version.pinned, version.source, version.updated - version.created) == (True, "hf://org/repo@1", 5)
    assert told == [
        ("adapter.register", {"version": 1, "source": "folder"}),
        ("adapter.load", {"version": 1, "digest": "sha256:a"}),
    ]


def test_a_failure_says_why_and_is_forgotten_with_the_next_load(using_adapters):
    async def work(adapters, catalogue):
        await loaded(adapters, "a")
        await registered(adapters)
        failed = await adapters.fail(NAME, 2, "no such tensor")
        told = (await actions(catalogue))[-1]
        return failed, told, await registered(adapters)

    failed, told, after = using_adapters(work)
    assert told == ("adapter.fail", {"version": 2})
    assert (failed.current, failed.newest.state, failed.newest.reason) == (1, "failed", "no such tensor")
    assert [version.number for version in after.versions] == [1, 3]


def test_the_same_files_make_no_second_version(using_adapters):
    async def work(adapters, _):
        await loaded(adapters, "a", "b")
        await registered(adapters, pinned=True)
        return await adapters.finish(NAME, 3, "folder", facts("a"))

    record = using_adapters(work)
    assert [(version.number, version.pinned) for version in record.versions] == [(1, True), (2, False)]
    assert record.current == 1


def test_a_version_that_two_servers_load_is_ready_with_the_first_and_stays_so(using_adapters):
    async def work(adapters, _):
        await loaded(adapters, "a")
        again = await adapters.finish(NAME, 1, "folder", facts("a"))
        late = await adapters.fail(NAME, 1, "the source is down")
        return again, late

    for record in using_adapters(work):
        assert (record.current, record.newest.state, record.newest.facts) == (1, "ready", facts("a"))


def test_a_late_load_of_what_is_ready_undoes_no_rollback(using_adapters):
    async def work(adapters, catalogue):
        await loaded(adapters, "a", "b")
        rolled_back = await adapters.rollback(NAME, 1, actor="test")
        told = await actions(catalogue)
        assert await adapters.finish(NAME, 2, "folder", facts("b")) == rolled_back
        assert await actions(catalogue) == told

    using_adapters(work)


def test_a_rollback_goes_one_version_back_or_to_the_named_one(using_adapters):
    async def work(adapters, catalogue):
        record = await loaded(adapters, "a", "b", "c")
        assert record.previous.number == 2
        record = await adapters.rollback(NAME, 2, actor="test")
        assert (record.current, record.previous.number) == (2, 1)
        record = await adapters.rollback(NAME, 1, actor="test")
        assert record.previous is None
        return (await actions(catalogue))[-1]

    assert using_adapters(work) == ("adapter.rollback", {"version": 1, "digest": "sha256:a", "from": 2})


def test_only_what_is_ready_can_be_current_or_have_an_alias(using_adapters):
    async def to_unready(adapters, _):
        await loaded(adapters, "a")
        await registered(adapters)
        await adapters.rollback(NAME, 2, actor="test")

    async def alias_of_missing(adapters, _):
        await loaded(adapters, "a")
        await adapters.set_alias(NAME, "prod", 7, actor="test")

    for work, missing in ((to_unready, f"{NAME}@2"), (alias_of_missing, f"{NAME}@7")):
        error = refusal(using_adapters, work)
        assert error.kind is ErrorKind.ADAPTER_NOT_FOUND
        assert missing in error.message


def test_an_alias_is_moved_and_removed(using_adapters):
    async def work(adapters, catalogue):
        await loaded(adapters, "a", "b")
        await adapters.set_alias(NAME, "prod", 1, actor="test")
        moved = await adapters.set_alias(NAME, "prod", 2, actor="test")
        gone = await adapters.remove_alias(NAME, "prod", actor="test")
        with pytest.raises(ServiceError, match="acme/mood@prod"):
            await adapters.remove_alias(NAME, "prod", actor="test")
        return moved, gone, [action for action, _ in await actions(catalogue)][-3:]

    moved, gone, told = using_adapters(work)
    assert (moved.aliases, moved.find("prod").number, gone.aliases) == ({"prod": 2}, 2, {})
    assert told == ["adapter.alias", "adapter.alias", "adapter.alias_remove"]


def test_a_version_of_many_names_is_one_version(using_adapters):
    async def work(adapters, _):
        await loaded(adapters, "a", "b")
        for alias in ("prod", "canary", "Best"):
            await adapters.set_alias(NAME, alias, 1, actor="test")
        return await adapters.all()

    [record] = using_adapters(work)
    assert [version.number for version in record.versions] == [1, 2]
    assert list(record.aliases.items()) == [("Best", 1), ("canary", 1), ("prod", 1)]


def test_a_version_in_use_is_not_removed(using_adapters):
    async def work(adapters, _):
        await loaded(adapters, "a", "b", "c")
        await adapters.set_alias(NAME, "prod", 1, actor="test")
        messages = []
        for number in (1, 3):
            with pytest.raises(ServiceError) as caught:
                await adapters.remove_version(NAME, number, actor="test")
            assert caught.value.kind is ErrorKind.VERSION_IN_USE
            messages.append(caught.value.message)
        return messages, await adapters.remove_version(NAME, 2, actor="test")

    messages, record = using_adapters(work)
    assert "the alias 'prod' names it" in messages[0]
    assert "it is the current one" in messages[1]
    assert [version.number for version in record.versions] == [1, 3]


def test_the_only_version_goes_with_its_adapter(using_adapters):
    async def work(adapters, _):
        await registered(adapters)
        await adapters.fail(NAME, 1, "bad")
        await adapters.remove_version(NAME, 1, actor="test")

    assert refusal(using_adapters, work).kind is ErrorKind.VERSION_IN_USE


def test_what_is_removed_is_forgotten(using_adapters):
    async def work(adapters, catalogue):
        await loaded(adapters, "a", "b")
        await adapters.set_alias(NAME, "prod", 1, actor="test")
        await adapters.remove(NAME, actor="test")
        assert await adapters.all() == []
        with pytest.raises(ServiceError, match="no adapter is named"):
            await adapters.finish(NAME, 1, "folder", facts("c"))
        return (await actions(catalogue))[-1], (await catalogue.verify())[2]

    told, problem = using_adapters(work)
    assert told == ("adapter.remove", {"versions": {"1": "sha256:a", "2": "sha256:b"}})
    assert problem is None


def test_quotas_count_the_versions_that_are_kept(using_adapters):
    async def work(adapters, _):
        await loaded(adapters, "a", "b")
        same = await loaded(adapters, "a")
        assert same.current == 1
        with pytest.raises(ServiceError, match="keeps 2 versions of adapters") as caught:
            await loaded(adapters, "c")
        with pytest.raises(ServiceError, match="keeps 3 versions of adapters"):
            await registered(adapters, "acme/other")
        record = await adapters.find(NAME)
        return caught.value, record, await registered(adapters, "shared")

    error, record, shared = using_adapters(work, adapters=2)
    assert error.kind is ErrorKind.ADAPTER_QUOTA
    assert record.current == 1
    assert shared.versions


def test_quotas_count_bytes(using_adapters):
    async def work(adapters, _):
        await loaded(adapters, "a", "b", size=40)
        await loaded(adapters, "c", size=21)

    error = refusal(using_adapters, work, adapter_bytes=100)
    assert error.kind is ErrorKind.ADAPTER_QUOTA
    assert "would take 101 bytes; its limit is 100" in error.message
