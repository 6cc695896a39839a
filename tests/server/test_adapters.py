from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from molex import write_adapter
from server.adapters import AdapterStore
from server.errors import ErrorKind, ServiceError
from server.metrics import Metrics
from tests.tiny import molex_config, random_adapter, tiny_base


@pytest.fixture
def root(make_adapters, tmp_path):
    return make_adapters(tmp_path / "adapters")


@pytest.fixture
def store(models, root):
    return AdapterStore(models, http_root=root, capacity=10, metrics=Metrics())


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(call, *arguments) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        call(*arguments)
    return caught.value


def test_a_folder_of_adapters_is_loaded_with_their_bases(store, root):
    assert store.load_folder(root) == {}
    assert {served.name: served.base for served in store.all()} == {
        "judge": "dec",
        "mood": "enc",
        "poet": "dec",
        "rank2": "enc",
        "topic": "enc",
        "writer": "dec",
    }
    assert (store.count("enc"), store.count("dec")) == (3, 3)


def test_one_bad_folder_does_not_keep_the_others_from_loading(store, root):
    (root / "mood" / "adapter_model.safetensors").write_bytes(b"junk")
    refused = store.load_folder(root)
    assert list(refused) == ["mood"]
    assert "adapter_model.safetensors" in refused["mood"]
    assert "topic" in store


def test_a_bad_tensor_is_named(store, root):
    path = root / "topic" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_A" in name)
    save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, path)
    error = refusal(store.load, "topic", root / "topic", "enc")
    assert error.kind is ErrorKind.BAD_ADAPTER
    assert error.param == name
    assert name in error.message
    assert "topic" not in store


def test_a_bad_field_is_named(store, root):
    edit_config(root / "topic", use_dora=True)
    error = refusal(store.load, "topic", root / "topic", "enc")
    assert "use_dora" in error.message


def test_a_failed_reload_leaves_the_old_adapter(store, root):
    before, created = store.load("topic", root / "topic")
    assert created
    (root / "topic" / "adapter_model.safetensors").unlink()
    refusal(store.load, "topic", root / "topic")
    assert store.get("topic") is before


def test_a_reload_replaces_under_the_same_name(store, root):
    before, _ = store.load("x", root / "mood")
    after, created = store.load("x", root / "topic")
    assert not created
    assert store.get("x") is after
    assert after.adapter.digest != before.adapter.digest


def test_the_base_that_the_config_names_is_tried_alone(store, root):
    edit_config(root / "topic", base_model_name_or_path="/somewhere/dec")
    error = refusal(store.load, "topic", root / "topic")
    assert "fits no base" not in error.message


def test_an_adapter_that_fits_no_base_says_why_for_each(store, root):
    edit_config(root / "topic", target_modules=["nothing"])
    error = refusal(store.load, "topic", root / "topic")
    assert "enc: target_modules" in error.message
    assert "; dec: " in error.message


def test_an_adapter_that_fits_several_bases_needs_its_base_named(models, root, tmp_path):
    twins = {"one": models["enc"], "two": models["enc"]}
    store = AdapterStore(twins, http_root=root, capacity=10, metrics=Metrics())
    assert refusal(store.load, "topic", root / "topic").param == "base"
    assert store.load("topic", root / "topic", "two")[0].base == "two"


def test_an_adapter_for_generation_needs_a_decoder(store, models, tmp_path):
    adapter = random_adapter(models["enc"].spec, seed=1, task="CAUSAL_LM", molex=molex_config((0,)))
    write_adapter(adapter, tmp_path / "odd")
    error = refusal(store.load, "odd", tmp_path / "odd", "enc")
    assert "task_type" in error.message


@pytest.mark.parametrize(
    "name", ["", ".hidden", "A/b", "a/b/c", "a/", "/b", "../b", "..", "a b", "x" * 129, "é", "a\n"]
)
def test_names_that_are_unsafe_in_paths_or_logs_are_refused(store, root, name):
    assert refusal(store.load, name, root / "topic").param == "name"


def test_the_name_of_a_base_is_taken(store, root):
    for name in ("enc", "acme/enc"):
        assert refusal(store.load, name, root / "topic").kind is ErrorKind.NAME_TAKEN


def test_an_unknown_base_is_refused(store, root):
    assert refusal(store.load, "x", root / "topic", "gpt9").param == "base"


def test_the_number_of_adapters_is_limited(models, root):
    store = AdapterStore(models, http_root=root, capacity=1, metrics=Metrics())
    store.load("x", root / "topic")
    assert refusal(store.load, "y", root / "topic").kind is ErrorKind.TOO_MANY_ADAPTERS
    store.load("x", root / "mood")


def test_removing_forgets_the_name(store, root):
    store.load("x", root / "topic")
    store.remove("x")
    assert refusal(store.get, "x").kind is ErrorKind.ADAPTER_NOT_FOUND
    assert refusal(store.remove, "x").kind is ErrorKind.ADAPTER_NOT_FOUND


def test_callers_name_folders_by_relative_or_absolute_path(store, root):
    assert store.load_for_caller("x", "topic", None)[0].source == "topic"
    assert store.load_for_caller("y", str(root / "mood"), None)[0].base == "enc"


@pytest.fixture
def outside(root, tmp_path):
    shutil.copytree(root / "topic", tmp_path / "outside")
    return tmp_path / "outside"


def test_callers_cannot_leave_the_root_by_path(store, outside):
    for source in (str(outside), "../outside", "topic/../../outside", "/etc", ".."):
        assert refusal(store.load_for_caller, "x", source, None).kind is ErrorKind.FORBIDDEN_SOURCE


def test_callers_cannot_leave_the_root_by_link(store, root, outside):
    (root / "link").symlink_to(outside)
    assert refusal(store.load_for_caller, "x", "link", None).kind is ErrorKind.FORBIDDEN_SOURCE
    weights = root / "topic" / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(outside / "adapter_model.safetensors")
    assert refusal(store.load_for_caller, "x", "topic", None).kind is ErrorKind.FORBIDDEN_SOURCE


@pytest.mark.parametrize("source", ["nowhere", "topic/adapter_config.json", "x" * 1000, "a\0b"])
def test_a_source_that_is_no_folder_is_refused(store, source):
    error = refusal(store.load_for_caller, "x", source, None)
    assert (error.kind, error.param) == (ErrorKind.BAD_ADAPTER, "source")


def test_a_link_to_itself_is_refused(store, root):
    (root / "loop").symlink_to(root / "loop")
    assert refusal(store.load_for_caller, "x", "loop", None).kind.status == 400


def test_without_a_root_callers_load_nothing(models, root):
    store = AdapterStore(models, http_root=None, capacity=1, metrics=Metrics())
    assert refusal(store.load_for_caller, "x", "topic", None).kind is ErrorKind.FORBIDDEN_SOURCE


def test_bases_of_one_family_are_told_apart_by_shape(models, root, tmp_path):
    bert = tiny_base("bert", tmp_path / "bert")
    both = {"bert": type(models["enc"]).from_pretrained(bert), "enc": models["enc"]}
    store = AdapterStore(both, http_root=root, capacity=9, metrics=Metrics())
    assert store.load("topic", root / "topic")[0].base == "enc"
