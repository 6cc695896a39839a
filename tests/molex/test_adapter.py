"""Adapters in memory: fresh ones, their parameters and their labels."""

from __future__ import annotations

import pytest
import torch

from molex import BARE, AdapterError
from molex.adapter import adapted_sites, new_adapter, tensor_shapes
from molex.config import AdapterConfig
from tests.tiny import (
    DECODERS,
    ENCODERS,
    HIDDEN,
    LAYERS,
    adapter_config,
    molex_config,
    random_adapter,
    relabel,
)

MIXTURES = {
    "lora": None,
    "linear": molex_config(),
    "linear by depth": molex_config([1, 3], gate={"scope": "depth"}),
    "cosine": molex_config([0], gate={"kind": "cosine", "projection_dim": 6}),
}


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("family", ENCODERS + DECODERS)
def test_a_fresh_adapter_has_the_tensors_of_its_file(family, mixture, spec_of):
    spec = spec_of(family)
    config = adapter_config(spec, molex=MIXTURES[mixture])
    adapter = new_adapter(spec, config, num_labels=3, seed=1)
    shapes = tensor_shapes(config, spec, 3, pooler=True)
    assert {name: tuple(tensor.shape) for name, tensor in adapter.tensors.items()} == shapes
    assert {tensor.dtype for tensor in adapter.tensors.values()} == {torch.float32}
    assert adapter.digest == ""
    assert adapter.num_labels == 3
    assert adapter.nbytes == sum(4 * tensor.numel() for tensor in adapter.tensors.values())
    assert adapter.kind == ("lora" if mixture == "lora" else "molex")


def test_gates_are_shared_or_one_for_each_depth(spec_of):
    spec = spec_of("roberta")
    shared = random_adapter(spec, seed=1, molex=MIXTURES["linear"]).gates
    assert set(shared) == set(range(LAYERS))
    assert len({id(gate) for gate in shared.values()}) == 1
    own = random_adapter(spec, seed=1, molex=MIXTURES["linear by depth"])
    assert set(own.gates) == {1, 3}
    assert len({id(gate) for gate in own.gates.values()}) == 2
    assert "molex.gate.3.weight" in own.tensors


def test_the_shapes_of_gates_and_mixture(spec_of):
    spec = spec_of("gpt2")
    config = adapter_config(spec, task="CAUSAL_LM", molex=MIXTURES["cosine"])
    shapes = tensor_shapes(config, spec, 0, pooler=False)
    assert {name: shape for name, shape in shapes.items() if name.startswith("molex.")} == {
        "molex.gate.projector.weight": (6, HIDDEN),
        "molex.gate.projector.bias": (6,),
        "molex.gate.similarity": (6, LAYERS),
        "molex.gate.temperature": (1,),
        "molex.mix": (1, 2),
    }
    stem = "base_model.model.transformer.h.0.attn.c_attn"
    assert shapes[f"{stem}.lora_A.weight"] == (4, HIDDEN)
    assert shapes[f"{stem}.lora_B.weight"] == (3 * HIDDEN, 4)


def test_training_starts_from_the_base_model(spec_of):
    adapter = new_adapter(spec_of("roberta"), adapter_config(spec_of("roberta")), num_labels=2, seed=1)
    for name, tensor in adapter.tensors.items():
        if "lora_B" in name:
            assert not tensor.any()
        if "lora_A" in name:
            assert tensor.any()


def test_a_seed_gives_the_same_weights(spec_of):
    config = adapter_config(spec_of("roberta"), molex=MIXTURES["linear"])
    one, same, other = (new_adapter(spec_of("roberta"), config, num_labels=2, seed=s) for s in (1, 1, 2))
    assert all(torch.equal(tensor, same.tensors[name]) for name, tensor in one.tensors.items())
    assert not torch.equal(one.tensors["molex.gate.weight"], other.tensors["molex.gate.weight"])


def test_a_fixed_mixture_is_no_parameter(spec_of):
    config = adapter_config(spec_of("roberta"), molex=molex_config([0, 2]))
    adapter = new_adapter(spec_of("roberta"), config, num_labels=2, mix=(0.9, 0.2), seed=1)
    assert adapter.mixing_pairs().tolist() == [pytest.approx([0.9, 0.2])] * 2
    assert set(adapter.tensors) - set(adapter.parameters()) == {"molex.mix"}


@pytest.mark.parametrize(("scope", "rows"), [("shared", 1), ("depth", 3)])
def test_a_learned_mixture_is_a_softmax_of_two_scalars(scope, rows, spec_of):
    molex = molex_config([0, 2, 4], mix="learned", mix_scope=scope)
    config = adapter_config(spec_of("roberta"), molex=molex)
    adapter = new_adapter(spec_of("roberta"), config, num_labels=2, mix=(0.8, 0.2), seed=1)
    logits = adapter.parameters()["molex.mix_logits"]
    assert logits.shape == (rows, 2)
    assert set(adapter.parameters()) == set(adapter.tensors)
    pairs = adapter.mixing_pairs()
    assert pairs.shape == (3, 2)
    torch.testing.assert_close(pairs, torch.tensor([[0.8, 0.2]] * 3))
    pairs[:, 0].sum().backward()
    assert logits.grad.abs().sum() > 0


def test_a_loaded_adapter_has_nothing_to_train(spec_of):
    assert random_adapter(spec_of("roberta"), seed=1, molex=molex_config()).parameters() == {}


def test_labels_are_the_adapters_own_or_those_of_transformers(spec_of):
    adapter = random_adapter(spec_of("roberta"), seed=1, num_labels=2)
    assert adapter.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert relabel(adapter, ["no", "yes"]).id2label == {0: "no", 1: "yes"}
    generator = random_adapter(spec_of("gpt2"), seed=1, task="CAUSAL_LM")
    assert (generator.num_labels, generator.id2label, generator.head) == (0, {}, None)


def test_bare_is_an_adapter_that_does_nothing():
    assert (BARE.digest, BARE.tensors, BARE.gates, BARE.head) == ("", {}, {}, None)
    assert not BARE.lora.updates


def sites(spec, *targets, layers=None):
    config = AdapterConfig("SEQ_CLS", 2, 4.0, targets, layers_to_transform=layers)
    return adapted_sites(config, spec)


def test_targets_name_the_ends_of_module_paths(spec_of):
    spec = spec_of("roberta")
    assert sites(spec, "query", layers=(1,)) == [(1, "attention.self.query")]
    dense = ["attention.output.dense", "intermediate.dense", "output.dense"]
    assert sites(spec, "dense", layers=(0,)) == [(0, name) for name in dense]
    assert sites(spec, "query", "self.query", layers=(0,)) == sites(spec, "query", layers=(0,))
    assert len(sites(spec, "query")) == LAYERS


@pytest.mark.parametrize("target", ["uery", "attention", "nonesuch", ""])
def test_a_target_that_is_no_linear_layer_is_named(target, spec_of):
    with pytest.raises(AdapterError, match="names no linear layer of a block") as caught:
        sites(spec_of("roberta"), "query", target)
    assert caught.value.subject == "target_modules"
    assert repr(target) in str(caught.value)


def test_scaling_is_plain_or_rank_stabilised():
    plain = AdapterConfig("SEQ_CLS", 16, 8.0, ("query",))
    assert plain.scaling == 0.5
    assert AdapterConfig("SEQ_CLS", 16, 8.0, ("query",), use_rslora=True).scaling == 2.0
