"""From official checkpoints to adapters. The routes and logits themselves are in test_golden.py."""

from __future__ import annotations

import json
import os

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaModel

from molex import AdapterError, MolexModel, Row
from molex.convert import ConversionError, convert
from molex.reference import Reference

SIZE, LAYERS, RANK, VOCAB = 16, 3, 2, 40

MOLEX_FIELDS = {
    "use_gate": True,
    "use_indv_gate": False,
    "use_learn_weight": 1,
    "weight_main_init": 0.9,
    "weight_other_init": 0.1,
    "proj_dim": 5,
}
GPT2_FIELDS = MOLEX_FIELDS | {
    "n_positions": 20,
    "n_embd": SIZE,
    "n_layer": LAYERS,
    "n_head": 2,
    "lora_attn_dim": RANK,
    "lora_attn_alpha": 4,
    "layers_to_use": LAYERS,
    "cosine_gate": False,
    "mean_mode": False,
}
ROBERTA_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": SIZE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 22,
    "type_vocab_size": 1,
}
ROBERTA_FIELDS = (
    MOLEX_FIELDS
    | ROBERTA_SIZES
    | {
        "model_type": "roberta",
        "apply_lora": True,
        "lora_r": RANK,
        "lora_alpha": 4,
        "layers_to_use": 1,
        "expert_choice": False,
    }
)


def randn(*shape):
    return torch.randn(*shape) * 0.3


def gpt2_weights():
    """A checkpoint whose depths share one linear gate and two learned scalars."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_positions=20, n_embd=SIZE, n_layer=LAYERS, n_head=2)
    model = GPT2LMHeadModel(config)
    weights = {
        name: t + randn(*t.shape) for name, t in model.state_dict().items() if name != "lm_head.weight"
    }
    weights["lm_head.decoder.weight"] = weights["transformer.wte.weight"].clone()
    for layer in range(LAYERS):
        stem = f"transformer.h.{layer}.attn.c_attn"
        weights[f"{stem}.lora_A"] = randn(2 * RANK, SIZE)
        weights[f"{stem}.lora_B"] = randn(2 * SIZE, RANK)
    weights |= {"transformer.gate.weight": randn(LAYERS, SIZE), "transformer.gate.bias": randn(LAYERS)}
    # As training might leave them: they neither are probabilities nor sum to 1.
    return weights | {
        "transformer.weight_main": torch.tensor([0.8]),
        "transformer.weight_other": torch.tensor([0.3]),
    }


def roberta_weights():
    torch.manual_seed(0)
    model = RobertaModel(RobertaConfig(**ROBERTA_SIZES), add_pooling_layer=False)
    weights = {f"roberta.{name}": t + randn(*t.shape) for name, t in model.state_dict().items()}
    for layer in range(LAYERS):
        for module in ("query", "value"):
            stem = f"roberta.encoder.layer.{layer}.attention.self.{module}"
            weights |= {f"{stem}.lora_A": randn(RANK, SIZE), f"{stem}.lora_B": randn(SIZE, RANK)}
    weights |= {
        "roberta.encoder.gate.weight": randn(LAYERS, SIZE),
        "roberta.encoder.gate.bias": randn(LAYERS),
        "roberta.encoder.weight_main": torch.tensor([2.0]),
        "roberta.encoder.weight_other": torch.tensor([-1.0]),
        "classifier.dense.weight": randn(SIZE, SIZE),
        "classifier.dense.bias": randn(SIZE),
        "classifier.out_proj.weight": randn(2, SIZE),
        "classifier.out_proj.bias": randn(2),
    }
    return weights


FAMILIES = {
    "gpt2": (GPT2_FIELDS, gpt2_weights, "model.pt"),
    "roberta": (ROBERTA_FIELDS, roberta_weights, "pytorch_model.bin"),
}


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a checkpoint folder: fields and weights may be changed, `...` leaves one out."""

    def write(family, fields=(), weights=()):
        known_fields, make, name = FAMILIES[family]
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        kept = {k: v for k, v in (known_fields | dict(fields)).items() if v is not ...}
        (folder / "config.json").write_text(json.dumps(kept))
        state = {k: v for k, v in (make() | dict(weights)).items() if v is not ...}
        torch.save({"model_state_dict": state} if family == "gpt2" else state, folder / name)
        return folder

    return write


def converted(source, tmp_path):
    convert(source, tmp_path / "adapter", tmp_path / "base")
    model = MolexModel.from_pretrained(tmp_path / "base")
    return model, model.load_adapter("a", tmp_path / "adapter")


def test_two_learned_scalars_that_all_depths_of_gpt2_share_multiply_as_they_are(checkpoint, tmp_path):
    _, adapter = converted(checkpoint("gpt2"), tmp_path)
    torch.testing.assert_close(adapter.mixing_pairs(), torch.tensor([[0.8, 0.3]] * LAYERS))


def test_two_learned_scalars_of_roberta_are_exponentials(checkpoint, tmp_path):
    _, adapter = converted(checkpoint("roberta"), tmp_path)
    pair = torch.tensor([2.0, -1.0]).softmax(dim=0)
    torch.testing.assert_close(adapter.mixing_pairs(), pair.repeat(2, 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fixed_pair_is_taken_as_it_is(checkpoint, tmp_path, family):
    _, adapter = converted(checkpoint(family, {"use_learn_weight": 0}), tmp_path)
    torch.testing.assert_close(adapter.mixing_pairs()[0], torch.tensor([0.9, 0.1]))


def test_scalars_of_each_depth_of_gpt2_are_exponentials(checkpoint, tmp_path):
    scalars = {}
    for depth in range(LAYERS):
        scalars[f"transformer.h.{depth}.weight_main"] = torch.tensor([float(depth)])
        scalars[f"transformer.h.{depth}.weight_other"] = torch.tensor([0.0])
    _, adapter = converted(checkpoint("gpt2", weights=scalars), tmp_path)
    own = torch.tensor([0.0, 1.0, 2.0]).sigmoid()
    torch.testing.assert_close(adapter.mixing_pairs()[:, 0], own)
    assert adapter.molex.mix_scope == "depth"


@pytest.mark.parametrize(("family", "depths"), [("gpt2", (0, 1)), ("roberta", (0, 1, 2))])
def test_roberta_mixes_one_depth_more_than_gpt2(checkpoint, tmp_path, family, depths):
    _, adapter = converted(checkpoint(family, {"layers_to_use": 2}), tmp_path)
    assert adapter.molex.mixed_depths == depths


def test_a_checkpoint_without_gate_is_a_lora_adapter(checkpoint, tmp_path):
    _, adapter = converted(checkpoint("roberta", {"use_gate": False}), tmp_path)
    assert adapter.kind == "lora"


@pytest.mark.parametrize(("outputs", "regression"), [(1, True), (3, False)])
def test_one_output_is_a_regression(checkpoint, tmp_path, outputs, regression):
    head = {
        "classifier.out_proj.weight": randn(outputs, SIZE),
        "classifier.out_proj.bias": randn(outputs),
    }
    _, adapter = converted(checkpoint("roberta", weights=head), tmp_path)
    assert adapter.regression == regression


def test_query_and_value_of_gpt2_keep_their_own_factors(checkpoint, tmp_path):
    _, adapter = converted(checkpoint("gpt2"), tmp_path)
    weights = gpt2_weights()
    for layer in range(LAYERS):
        update = adapter.lora.updates[layer, "attn.c_attn"]
        a, b = (weights[f"transformer.h.{layer}.attn.c_attn.lora_{factor}"] for factor in "AB")
        query, value = b[:SIZE] @ a[:RANK], b[SIZE:] @ a[RANK:]
        expected = torch.cat([query, torch.zeros(SIZE, SIZE), value]) * (4 / RANK)
        torch.testing.assert_close(update.scaling * update.b @ update.a, expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_converted_folders_run(checkpoint, tmp_path, family):
    model, adapter = converted(checkpoint(family), tmp_path)
    ids = [5, 9, 30, 2]
    output = model.run([Row(ids, adapter)], lm_logits="all")
    expected, _ = Reference(tmp_path / "base")(ids, adapter)
    torch.testing.assert_close(output.logits[0], expected, atol=1e-4, rtol=1e-4)


def test_only_the_base_depends_on_whether_the_updates_were_merged(checkpoint, tmp_path):
    """The official trainer saves the query and value weights with their updates added."""
    query = "encoder.layer.0.attention.self.query"
    weights = roberta_weights()
    merged = weights[f"roberta.{query}.weight"] + 1
    source = checkpoint("roberta", weights={f"roberta.{query}.weight": merged})
    _, adapter = converted(source, tmp_path)
    tensor = adapter.tensors[f"base_model.model.roberta.{query}.lora_A.weight"]
    assert torch.equal(tensor, weights[f"roberta.{query}.lora_A"])
    base = RobertaModel.from_pretrained(tmp_path / "base", add_pooling_layer=False)
    assert torch.equal(base.state_dict()[f"{query}.weight"], merged)


def test_no_base_is_written_unless_asked_for(checkpoint, tmp_path):
    convert(checkpoint("roberta"), tmp_path / "adapter")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "checkpoint"]


def refusal(source, tmp_path, words):
    with pytest.raises(ConversionError, match=words):
        convert(source, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_missing_folder_is_named(tmp_path):
    refusal(tmp_path / "nowhere", tmp_path, r"nowhere/config.json: cannot be read")


def test_a_config_that_is_not_json_is_named(checkpoint, tmp_path):
    source = checkpoint("roberta")
    (source / "config.json").write_text("{")
    refusal(source, tmp_path, r"checkpoint/config.json: cannot be read")


def test_a_folder_without_weights_is_named(checkpoint, tmp_path):
    source = checkpoint("roberta")
    (source / "pytorch_model.bin").unlink()
    refusal(source, tmp_path, r"checkpoint: neither pytorch_model.bin nor model.pt is there")


@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("gpt2", "n_layer"),
        ("gpt2", "lora_attn_dim"),
        ("gpt2", "lora_attn_alpha"),
        ("gpt2", "layers_to_use"),
        ("roberta", "lora_r"),
        ("roberta", "lora_alpha"),
        ("roberta", "layers_to_use"),
    ],
)
def test_a_missing_field_is_named(checkpoint, tmp_path, family, field):
    refusal(checkpoint(family, {field: ...}), tmp_path, rf"config.json: {field} is missing")


@pytest.mark.parametrize(
    ("family", "tensor"),
    [
        ("gpt2", "transformer.wte.weight"),
        ("gpt2", "lm_head.decoder.weight"),
        ("gpt2", "transformer.h.1.attn.c_attn.lora_A"),
        ("gpt2", "transformer.gate.bias"),
        ("gpt2", "transformer.weight_other"),
        ("roberta", "roberta.encoder.layer.2.attention.self.value.lora_B"),
        ("roberta", "roberta.encoder.gate.weight"),
    ],
)
def test_a_missing_tensor_is_named(checkpoint, tmp_path, family, tensor):
    refusal(checkpoint(family, weights={tensor: ...}), tmp_path, f"{tensor}: missing in the checkpoint")


def test_a_missing_head_is_named(checkpoint, tmp_path):
    source = checkpoint("roberta", weights={"classifier.out_proj.weight": ...})
    with pytest.raises(AdapterError, match=r"classifier.out_proj.weight: missing"):
        convert(source, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("roberta", "apply_adapter"),
        ("roberta", "apply_bitfit"),
        ("roberta", "use_pos_emb"),
        ("gpt2", "sig_sft"),
    ],
)
def test_what_is_not_supported_is_named(checkpoint, tmp_path, family, field):
    refusal(checkpoint(family, {field: True}), tmp_path, rf"config.json: {field} is not supported")


def test_an_untied_language_model_head_is_refused(checkpoint, tmp_path):
    head = {"lm_head.decoder.weight": torch.zeros(VOCAB, SIZE)}
    refusal(
        checkpoint("gpt2", weights=head), tmp_path, r"lm_head.decoder.weight: differs from transformer.wte"
    )


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


def test_a_pickle_that_runs_code_is_refused(checkpoint, tmp_path):
    source = checkpoint("roberta")
    torch.save({"x": Malicious(tmp_path / "witness")}, source / "pytorch_model.bin")
    refusal(source, tmp_path, r"pytorch_model.bin: cannot be read as plain weights")
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04"])
def test_a_damaged_weights_file_is_named(checkpoint, tmp_path, content):
    source = checkpoint("roberta")
    (source / "pytorch_model.bin").write_bytes(content)
    refusal(source, tmp_path, r"pytorch_model.bin: cannot be read as plain weights")


@pytest.mark.parametrize(
    "content", [[1, 2], torch.ones(2), {1: torch.ones(2)}, {"model_state_dict": 3}], ids=str
)
def test_a_file_without_named_tensors_is_named(checkpoint, tmp_path, content):
    source = checkpoint("roberta")
    torch.save(content, source / "pytorch_model.bin")
    refusal(source, tmp_path, r"pytorch_model.bin")


def test_a_config_that_is_no_object_is_named(checkpoint, tmp_path):
    source = checkpoint("roberta")
    (source / "config.json").write_text("[]")
    refusal(source, tmp_path, r"config.json")


def test_a_misshapen_base_tensor_is_named(checkpoint, tmp_path):
    name = "roberta.encoder.layer.1.output.dense.bias"
    refusal(checkpoint("roberta", weights={name: torch.ones(3)}), tmp_path, name)


@pytest.mark.parametrize("value", ["2", None])
def test_a_field_of_another_type_is_named(checkpoint, tmp_path, value):
    refusal(checkpoint("roberta", {"layers_to_use": value}), tmp_path, r"config.json: layers_to_use")
