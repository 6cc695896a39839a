"""Hostile adapter folders are refused by name, without much memory, and nobody else notices."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import pytest

from server.adapters import AdapterStore
from server.metrics import Metrics
from tests.hostile import corpus, device, instead, write_corpus

MEMORY = 64 * 2**20


@pytest.fixture(scope="module")
def root(adapters_folder, tmp_path_factory) -> Path:
    """The corpus, and one good folder among it."""
    folder = tmp_path_factory.mktemp("hostile")
    write_corpus(adapters_folder / "topic", folder)
    shutil.copytree(adapters_folder / "topic", folder / "good")
    return folder


def peak() -> int:
    """The most memory that this process has ever had, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_each_is_refused_by_name_and_neighbours_are_served(start, settings, adapters_folder, root):
    live = start(settings.model_copy(update={"adapter_root": root}))
    cases = corpus(adapters_folder / "topic")
    served = live.http.get("/v1/adapters").json()
    assert live.load("victim", "good").status_code == 201
    before = peak()
    named = {}
    for name in cases:
        for target in ("victim", "fresh"):
            answer = live.load(target, name, base="enc")
            assert answer.status_code in (400, 403, 413), (name, answer.text)
        named[name] = answer.json()["error"]["param"]
        assert str(root) not in answer.text
    # A link to itself leads nowhere: its source is at fault.
    assert named == {name: case.subject for name, case in cases.items()} | {"weights-loop": "source"}
    assert peak() - before < MEMORY
    assert live.classify(model="victim", input="w1").status_code == 200
    # A name whose load failed is listed with the reason.
    assert [live.unload(name).status_code for name in ("victim", "fresh")] == [204, 204]
    assert live.http.get("/v1/adapters").json() == served
    assert not Path("hostile-pickle-was-run").exists()


def test_at_start_the_good_folder_is_served_and_the_others_are_listed(models, settings, root):
    store = AdapterStore(models, settings, Metrics())
    before = peak()
    refused = store.load_folder(root)
    assert peak() - before < MEMORY
    assert [served.name for served in store.all()] == ["good"]
    # A folder without a config is none of an adapter.
    assert refused.keys() == {path.name for path in root.iterdir()} - {"good", "config-missing"}


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_device_is_never_read(models, settings, adapters_folder, tmp_path, name):
    shutil.copytree(adapters_folder / "topic", tmp_path / "device")
    instead(name, device)(tmp_path / "device")
    store = AdapterStore(models, settings, Metrics())
    assert f"{name}: is not a file" in store.load_folder(tmp_path)["device"]
