"""Which bases are taken, what is said about those that are not, and that running changes none."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from molex import MolexModel, Row
from molex.backbone import Backbone
from molex.errors import BaseModelError
from molex.layers import StockLayers
from tests.tiny import DECODERS, ENCODERS, HIDDEN, LAYERS, VOCAB, molex_config, random_adapter, random_ids

PREFIXES = {
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
    "gpt2": "transformer.h",
    "llama": "model.layers",
    "mistral": "model.layers",
    "qwen2": "model.layers",
}
LINEAR_LAYERS = {
    "bert": 6,
    "roberta": 6,
    "gpt2": 4,
    "llama": 7,
    "mistral": 7,
    "qwen2": 7,
}


@pytest.mark.parametrize("family", ENCODERS + DECODERS)
def test_the_facts_of_each_family(family, spec_of):
    spec = spec_of(family)
    assert (spec.model_type, spec.num_layers, spec.hidden_size, spec.vocab_size) == (
        family,
        LAYERS,
        HIDDEN,
        VOCAB,
    )
    assert spec.prefix == PREFIXES[family]
    assert len(spec.modules) == LINEAR_LAYERS[family]
    assert spec.generates == (family in DECODERS)
    assert spec.max_length == (95 if family == "roberta" else 96)
    assert spec.has_pooler == (family == "bert")
    assert spec.digest.startswith("sha256:")


def test_conv1d_sizes_are_inputs_then_outputs(spec_of):
    assert spec_of("gpt2").modules["attn.c_attn"] == (HIDDEN, 3 * HIDDEN)
    assert spec_of("llama").modules["self_attn.k_proj"] == (HIDDEN, HIDDEN // 2)


def test_the_digest_is_that_of_the_weights(base_folder, tmp_path):
    first, again = (Backbone.from_pretrained(base_folder("roberta")).spec.digest for _ in range(2))
    assert first == again
    model = AutoModelForSequenceClassification.from_pretrained(base_folder("roberta"))
    with torch.no_grad():
        model.roberta.encoder.layer[2].output.dense.bias[0] += 1
    model.save_pretrained(tmp_path)
    assert Backbone.from_pretrained(tmp_path).spec.digest != first


@pytest.mark.parametrize("family", ENCODERS + DECODERS)
@torch.no_grad()
def test_running_leaves_the_base_as_it_was(family, base_folder):
    model = MolexModel.from_pretrained(base_folder(family))
    inside = list(model.backbone.layers.blocks)
    before = [
        {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        for layer in model.backbone.layers.blocks
    ]
    bare = model.run([Row(random_ids(6, seed=2))]).logits[0]
    adapters = [
        random_adapter(model.spec, seed=1, molex=molex_config()),
        random_adapter(model.spec, seed=2, r=3),
    ]
    model.run([Row(random_ids(5, seed=n), adapter) for n, adapter in enumerate(adapters)])
    for layer, kept in zip(inside, before, strict=True):
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, kept[name]), name
    assert torch.equal(model.run([Row(random_ids(6, seed=2))]).logits[0], bare)
    assert model.backbone.layers.switch.active is None


@pytest.mark.parametrize("module", ["attention.self.key", "output.dense"])
def test_nothing_stays_switched_on_after_a_failure(module, base_folder, monkeypatch):
    model = MolexModel.from_pretrained(base_folder("roberta"))
    adapter = random_adapter(model.spec, seed=1)

    def fail(*_args, **_options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.backbone.layers.blocks[1].get_submodule(module), "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.run([Row([5], adapter)])
    assert model.backbone.layers.switch.active is None


def copy_of(folder, tmp_path, **changes):
    shutil.copytree(folder, tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return tmp_path / "base"


def refusal(base):
    with pytest.raises(BaseModelError) as caught:
        Backbone.from_pretrained(base)
    assert str(base) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("base", ["./no/such/folder", "/no/such/folder"])
def test_a_missing_folder_is_named(base):
    assert "no such folder" in refusal(base)


def test_a_folder_without_config_is_named(tmp_path):
    refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "[", "{}", '{"model_type": "nonesuch"}'])
def test_a_broken_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    refusal(tmp_path)


def test_an_unsupported_family_is_named_with_the_supported_ones(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "distilbert"}')
    message = refusal(tmp_path)
    assert "'distilbert' is not one of bert, roberta, gpt2, llama, mistral, qwen2" in message


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("bert", {"is_decoder": True}, "is_decoder is not supported for bert"),
        ("roberta", {"add_cross_attention": True}, "add_cross_attention is not supported"),
        ("bert", {"position_embedding_type": "relative_key"}, "relative position embeddings"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
        ("llama", {"num_key_value_heads": 3}, "4 query heads cannot share 3 key heads evenly"),
        ("qwen2", {"num_key_value_heads": 0}, "4 query heads cannot share 0 key heads evenly"),
    ],
)
def test_unsupported_options_are_named(family, changes, words, base_folder, tmp_path):
    assert words in refusal(copy_of(base_folder(family), tmp_path, **changes))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@torch.inference_mode()
def test_numbers_of_heads_that_a_family_does_not_read_change_nothing(family, base_folder, tmp_path):
    folders = base_folder(family), copy_of(base_folder(family), tmp_path, head_dim=16, num_key_value_heads=1)
    answers = []
    for folder in folders:
        model = MolexModel.from_pretrained(folder)
        model.prepack()
        answers.append(model.run([Row(random_ids(6, seed=2))]).logits[0])
    assert torch.equal(*answers)


def test_missing_weights_are_named(base_folder, tmp_path):
    # One layer more than the file has weights for.
    base = copy_of(base_folder("llama"), tmp_path, num_hidden_layers=LAYERS + 1)
    assert f"no weights for model.layers.{LAYERS}." in refusal(base)


def test_a_folder_without_weights_is_named(base_folder, tmp_path):
    base = copy_of(base_folder("bert"), tmp_path)
    (base / "model.safetensors").unlink()
    refusal(base)


def test_a_damaged_weights_file_is_named(base_folder, tmp_path):
    base = copy_of(base_folder("bert"), tmp_path)
    (base / "model.safetensors").write_bytes(b"garbage")
    refusal(base)


def test_weights_of_other_shapes_are_named(base_folder, tmp_path):
    refusal(copy_of(base_folder("bert"), tmp_path, intermediate_size=48))


@pytest.mark.parametrize("family", ["roberta", "llama"])
def test_a_warm_up_runs_each_compiled_size_once_in_each_branch(base_folder, family, monkeypatch):
    model = MolexModel.from_pretrained(base_folder(family), routed_dtype=torch.bfloat16)
    model.prepack()
    layers = model.backbone.layers
    sizes = {0: [], model.spec.num_layers: []}
    project = layers.project

    def spy(stage, numbers, hidden):
        sizes[numbers[0]].append(len(hidden))
        return project(stage, numbers, hidden)

    monkeypatch.setattr(layers, "project", spy)
    model.warm_up(20)
    assert all(branch == list(layers.compiled_sizes(20)) != [] for branch in sizes.values())


def test_a_warm_up_is_free_where_no_kernels_are_compiled(base_folder, monkeypatch):
    model = MolexModel.from_pretrained(base_folder("llama"), dtype=torch.float64)
    model.prepack()
    monkeypatch.delattr(StockLayers, "project")
    model.warm_up(512)
