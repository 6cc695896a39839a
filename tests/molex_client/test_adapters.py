"""Adapters and their versions, managed by either client on a running server."""

from __future__ import annotations

import json
import shutil
from itertools import count

import pytest

from molex.adapter_file import read_files
from molex_client import (
    AdapterFailedError,
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
)
from tests.molex_client.conftest import answer

NUMBERS = count()
CARD = {
    "name": "slow",
    "state": "loading",
    "reason": None,
    "version": None,
    "base": None,
    "kind": None,
    "task": None,
    "digest": None,
    "rank": None,
    "labels": {},
    "mixed_depths": [],
    "bytes": None,
    "resident": False,
    "pinned": False,
    "source": None,
    "created": 1,
    "versions": [],
    "aliases": {},
}
READY, FAILED = CARD | {"state": "ready"}, CARD | {"state": "failed", "reason": "lora_A: no effect"}


@pytest.fixture
def name() -> str:
    """Of an adapter that no other test has."""
    return f"pushed-{next(NUMBERS)}"


def test_a_folder_is_pushed_and_serves(call, live, adapters_folder, name):
    adapter = call(live.url, "push_adapter", name, adapters_folder / "mood", base="enc")
    assert (adapter.name, adapter.state, adapter.version) == (name, "ready", 1)
    assert adapter.digest == read_files(adapters_folder / "mood").digest
    assert adapter.labels == {0: "bad", 1: "fair", 2: "good"}
    assert call(live.url, "get_adapter", name) == adapter
    assert adapter in call(live.url, "list_adapters")
    own, original = (call(live.url, "classify", model, "w1").data for model in (name, "mood"))
    assert own == original
    again = call(live.url, "push_adapter", name, adapters_folder / "mood")
    assert [version.version for version in again.versions] == [1]


def test_versions_are_rolled_back_named_and_removed(call, live, adapters_folder, name):
    for folder in ("mood", "topic", "rank2"):
        call(live.url, "push_adapter", name, adapters_folder / folder)
    assert call(live.url, "rollback_adapter", name).version == 2
    assert call(live.url, "rollback_adapter", name, 1).version == 1
    with pytest.raises(ConflictError) as caught:
        call(live.url, "rollback_adapter", name)
    assert caught.value.code == "no_previous_version"
    assert call(live.url, "set_alias", name, "prod", 3).aliases == {"prod": 3}
    assert call(live.url, "set_alias", name, "next", "prod").aliases == {"prod": 3, "next": 3}
    digest = read_files(adapters_folder / "rank2").digest
    assert call(live.url, "classify", f"{name}@prod", "w1").adapter_digest == digest
    with pytest.raises(ConflictError, match=r"\(409, version_in_use, request "):
        call(live.url, "remove_version", name, 3)
    assert call(live.url, "rollback_adapter", name, "prod").version == 3
    call(live.url, "remove_alias", name, "next")
    call(live.url, "remove_version", name, 2)
    left = call(live.url, "get_adapter", name)
    assert ([version.version for version in left.versions], left.aliases) == ([1, 3], {"prod": 3})
    call(live.url, "remove_adapter", name)
    for method in ("get_adapter", "remove_adapter"):
        with pytest.raises(NotFoundError) as missing:
            call(live.url, method, name)
        assert missing.value.code == "adapter_not_found"


def test_a_source_is_loaded_and_another_refused(call, live, name):
    adapter = call(live.url, "load_adapter", name, "topic", base="enc")
    assert (adapter.state, adapter.source) == ("ready", "topic")
    with pytest.raises(PermissionDeniedError) as caught:
        call(live.url, "load_adapter", name, "hf://somebody/something")
    assert caught.value.code == "forbidden_source"


def test_without_a_wait_the_load_is_watched(call, live, adapters_folder, name):
    begun = call(live.url, "push_adapter", name, adapters_folder / "topic", wait=0)
    assert begun.name == name
    ready = call(live.url, "wait_for_adapter", name)
    assert (ready.state, ready.version, ready.settled) == ("ready", 1, True)


def test_a_bad_folder_names_the_tensor_at_fault(call, live, adapters_folder, tmp_path, name):
    folder = shutil.copytree(adapters_folder / "mood", tmp_path / "mood")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(InvalidRequestError, match="lora_A") as caught:
        call(live.url, "push_adapter", name, folder, base="enc")
    assert caught.value.code == "invalid_adapter"
    with pytest.raises(AdapterFailedError, match=rf"adapter '{name}' failed to load: .*lora_A"):
        call(live.url, "wait_for_adapter", name)


def test_a_folder_without_its_files_is_not_sent(call, live, tmp_path, name):
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        call(live.url, "push_adapter", name, tmp_path)


def test_looks_at_a_slow_load_become_rarer(call, script, pauses):
    script.answers = [answer(200, CARD)] * 7 + [answer(200, READY)]
    assert call(script.url, "wait_for_adapter", "slow").settled
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 5, 5]


def test_a_load_that_fails_or_takes_too_long_is_an_error(call, script, pauses):
    script.answers = [answer(200, CARD), answer(200, FAILED)]
    with pytest.raises(
        AdapterFailedError, match="adapter 'slow' failed to load: lora_A: no effect"
    ) as caught:
        call(script.url, "wait_for_adapter", "slow")
    assert caught.value.name == "slow"
    script.answers = [answer(200, CARD)]
    with pytest.raises(AdapterFailedError, match=r"is loading after 0\.1 seconds"):
        call(script.url, "wait_for_adapter", "slow", 0.1)
