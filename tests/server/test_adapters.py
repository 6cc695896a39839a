from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from molex import write_adapter
from server.adapters import AdapterStore
from server.errors import ErrorKind, ServiceError
from server.metrics import Metrics
from server.settings import Settings
from tests.tiny import molex_config, random_adapter, tiny_base


@pytest.fixture
def root(make_adapters, tmp_path):
    return make_adapters(tmp_path / "adapters")


@pytest.fixture
def make_store(models, root):
    """A store with the standard bases, or others, and some settings changed."""

    def make(bases=models, **changes) -> AdapterStore:
        named = dict.fromkeys(bases, "not read")
        return AdapterStore(bases, Settings(bases=named, **{"adapters": root, **changes}), Metrics())

    return make


@pytest.fixture
def store(make_store):
    return make_store()


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
    assert all(map(store.is_resident, store.all()))


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
    assert after.digest != before.digest


def test_the_base_that_the_config_names_is_tried_alone(store, root):
    edit_config(root / "topic", base_model_name_or_path="/somewhere/dec")
    error = refusal(store.load, "topic", root / "topic")
    assert "fits no base" not in error.message


def test_an_adapter_that_fits_no_base_says_why_for_each(store, root):
    edit_config(root / "topic", target_modules=["nothing"])
    error = refusal(store.load, "topic", root / "topic")
    assert "enc: target_modules" in error.message
    assert "; dec: " in error.message


def test_an_adapter_that_fits_several_bases_needs_its_base_named(models, root, make_store):
    twins = {"one": models["enc"], "two": models["enc"]}
    store = make_store(twins)
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


def test_the_number_of_adapters_is_limited(make_store, root):
    store = make_store(max_adapters=1)
    store.load("x", root / "topic")
    assert refusal(store.load, "y", root / "topic").kind is ErrorKind.TOO_MANY_ADAPTERS
    store.load("x", root / "mood")


def test_removing_forgets_the_name(store, root):
    store.load("x", root / "topic")
    store.remove("x")
    assert refusal(store.get, "x").kind is ErrorKind.ADAPTER_NOT_FOUND
    assert refusal(store.remove, "x").kind is ErrorKind.ADAPTER_NOT_FOUND


def test_bases_of_one_family_are_told_apart_by_shape(models, root, make_store, tmp_path):
    bert = tiny_base("bert", tmp_path / "bert")
    both = {"bert": type(models["enc"]).from_pretrained(bert), "enc": models["enc"]}
    store = make_store(both)
    assert store.load("topic", root / "topic")[0].base == "enc"


def resident(store) -> list[str]:
    return [served.name for served in store.all() if store.is_resident(served)]


def bring_back(store, name):
    """What the loader does for a request."""
    assert store.reserve(store.get(name))
    return store.read_again(store.get(name))


def test_more_adapters_are_registered_than_fit_into_memory(make_store, root):
    store = make_store(max_resident_adapters=2)
    assert store.load_folder(root) == {}
    assert len(store.all()) == 6
    assert len(resident(store)) == 2
    assert sum(len(store.residents(base)) for base in ("enc", "dec")) == 2


def test_a_load_at_run_time_makes_room_for_itself(make_store, root):
    store = make_store(max_resident_adapters=2)
    for name in ("mood", "topic"):
        store.load(name, root / name)
    store.weights(store.get("mood"))
    store.load("rank2", root / "rank2")
    assert resident(store) == ["mood", "rank2"]
    assert store.weights(store.get("topic")) is None


def test_memory_is_counted_in_bytes(make_store, store, root):
    sizes = [store.load(name, root / name)[0].nbytes for name in ("mood", "topic")]
    tight = make_store(max_resident_bytes=sum(sizes) - 1)
    for name in ("mood", "topic"):
        tight.load(name, root / name)
    assert resident(tight) == ["topic"]


def test_an_adapter_without_any_room_is_refused(make_store, store, root):
    nbytes = store.load("mood", root / "mood")[0].nbytes
    error = refusal(make_store(max_resident_bytes=nbytes - 1).load, "mood", root / "mood")
    assert error.kind is ErrorKind.TOO_MANY_ADAPTERS
    assert f"'mood' of {nbytes} bytes" in error.message
    assert f"max_resident_bytes is {nbytes - 1}" in error.message


def test_what_was_evicted_comes_back_as_it_was(make_store, root):
    store = make_store(max_resident_adapters=1)
    served, _ = store.load("mood", root / "mood")
    before = store.weights(served)
    store.load("topic", root / "topic")
    after = bring_back(store, "mood")
    assert after is store.weights(served)
    assert after is not before
    assert after.digest == before.digest == served.digest
    assert all(torch.equal(after.tensors[name], tensor) for name, tensor in before.tensors.items())
    assert resident(store) == ["mood"]


def evicted(make_store, root, name):
    """A store that knows an adapter whose weights it has not in memory, and another one that is there."""
    store = make_store(max_resident_adapters=1)
    for one in (name, "rank2"):
        store.load(one, root / one)
    return store


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_other_weights_are_never_served_under_an_old_digest(make_store, root, file):
    store = evicted(make_store, root, "mood")
    before = (root / "mood" / file).read_bytes()
    (root / "mood" / file).write_bytes((root / "topic" / file).read_bytes())
    error = refusal(bring_back, store, "mood")
    assert error.kind is ErrorKind.ADAPTER_UNAVAILABLE
    assert error.message.startswith("adapter 'mood' is not in memory and cannot be read again: digest: ")
    assert resident(store) == []
    assert bring_back(store, "rank2").digest == store.get("rank2").digest
    (root / "mood" / file).write_bytes(before)
    assert bring_back(store, "mood").digest == store.get("mood").digest


def test_files_of_several_precisions_come_back_too(make_store, root):
    # No imprint is kept of them: they are validated anew each time.
    file = "adapter_model.safetensors"
    weights = root / "mood" / file
    tensors = load_file(weights)
    first = next(iter(tensors))
    save_file(tensors | {first: tensors[first].half()}, weights)
    store = evicted(make_store, root, "mood")
    assert bring_back(store, "mood").digest == store.get("mood").digest
    store.load("rank2", root / "rank2")
    weights.write_bytes((root / "topic" / file).read_bytes())
    assert refusal(bring_back, store, "mood").kind is ErrorKind.ADAPTER_UNAVAILABLE


def test_a_folder_that_is_gone_is_said_to_be_gone(make_store, root):
    store = evicted(make_store, root, "mood")
    shutil.rmtree(root / "mood")
    error = refusal(bring_back, store, "mood")
    assert "adapter_config.json: cannot be read (No such file or directory)" in error.message
    assert str(root) not in error.message
    assert "mood" in store
    store.load("mood", root / "topic")
    assert store.weights(store.get("mood")).digest == store.get("mood").digest


def test_what_was_replaced_or_removed_while_it_was_read_is_not_kept(make_store, root):
    store = evicted(make_store, root, "mood")
    old = store.get("mood")
    assert store.reserve(old)
    store.load("mood", root / "topic")
    assert store.read_again(old).digest == old.digest
    assert store.weights(old) is None
    new = store.get("mood")
    assert store.weights(new).digest == new.digest
    store.load("rank2", root / "rank2")
    assert store.reserve(new)
    store.remove("mood")
    assert store.read_again(new).digest == new.digest
    assert resident(store) == []
    store.load("topic", root / "topic")
    assert resident(store) == ["topic"]


def test_what_is_loaded_while_it_is_read_again_is_there_once(make_store, root):
    store = evicted(make_store, root, "mood")
    mood = store.get("mood")
    loaded = bring_back(store, "mood")
    store.load("rank2", root / "rank2")
    assert store.reserve(mood)
    assert store.keep(mood, loaded)
    assert store.read_again(mood) is loaded is store.weights(mood)


def test_a_pinned_adapter_stays(make_store, root):
    store = make_store(max_resident_adapters=2)
    store.load("mood", root / "mood", pinned=True)
    for name in ("topic", "rank2"):
        store.load(name, root / name)
    assert resident(store) == ["mood", "rank2"]
    store.load("mood", root / "mood")
    store.load("topic", root / "topic")
    store.load("judge", root / "judge")
    assert resident(store) == ["judge", "topic"]


def test_pinned_adapters_leave_room_for_others(make_store, root):
    store = make_store(max_resident_adapters=2)
    store.load("mood", root / "mood", pinned=True)
    error = refusal(lambda: store.load("topic", root / "topic", pinned=True))
    assert error.kind is ErrorKind.TOO_MANY_ADAPTERS
    assert "beside 1 pinned ones" in error.message
    store.load("mood", root / "topic", pinned=True)
    assert resident(store) == ["mood"]


def test_room_that_pinned_adapters_took_is_missed_by_name(make_store, store, root):
    sizes = {name: store.load(name, root / name)[0].nbytes for name in ("mood", "topic")}
    tight = make_store(max_resident_bytes=sum(sizes.values()) - 1)
    tight.load("mood", root / "mood")
    tight.load("topic", root / "topic", pinned=True)
    assert resident(tight) == ["topic"]
    assert refusal(tight.reserve, tight.get("mood")).kind is ErrorKind.TOO_MANY_ADAPTERS
