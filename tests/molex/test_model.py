"""The public use of the package, and what it says about wrong input."""

from __future__ import annotations

import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from molex import AdapterError, BaseModelError, InputError, MolexModel, Row, write_adapter
from molex.adapter import new_adapter
from molex.lora import BatchLora
from molex.native.layers import NativeLayers
from molex.reference import Reference
from tests.tiny import (
    DECODERS,
    ENCODERS,
    HIDDEN,
    VOCAB,
    adapter_config,
    molex_config,
    random_adapter,
    random_ids,
)


def saved(model, folder, **options):
    adapter = random_adapter(model.spec, **options)
    write_adapter(adapter, folder)
    return folder


@pytest.fixture
def model(base_folder, tmp_path):
    """An encoder with a MoLEx adapter `a` over depths 0 to 2 and a LoRA adapter `b`."""
    model = MolexModel.from_pretrained(base_folder("roberta"))
    model.load_adapter("a", saved(model, tmp_path / "a", seed=1, molex=molex_config([0, 1, 2])))
    model.load_adapter("b", saved(model, tmp_path / "b", seed=2, num_labels=4))
    return model


@pytest.fixture
def decoder(base_folder, tmp_path):
    model = MolexModel.from_pretrained(base_folder("llama"))
    molex = molex_config([1, 3])
    model.load_adapter("a", saved(model, tmp_path / "a", seed=1, task="CAUSAL_LM", molex=molex))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_public_use_on_an_encoder(base_folder, tmp_path, dtype):
    base_dir = str(base_folder("roberta"))
    model = MolexModel.from_pretrained(base_dir, dtype=dtype)
    adapter_dir = str(saved(model, tmp_path / "a", seed=1, molex=molex_config([0, 1, 2])))
    model.load_adapter("a", adapter_dir)
    out = model(input_ids=[[5, 7, 9], [4, 2]], adapters=["a", None])
    assert model.dtype == dtype
    assert [tuple(logits.shape) for logits in out.logits] == [(3,), (2, HIDDEN)]
    assert len(out.routes[0]) == 3
    assert all(type(layer) is int for layer in out.routes[0])
    assert out.routes[1] == []
    assert not any(logits.requires_grad for logits in out.logits)


def test_public_use_on_a_decoder(decoder):
    out = decoder(input_ids=[[5, 7, 9], [4, 2]], adapters=["a", None], prompt_lengths=[2, 1])
    assert [tuple(logits.shape) for logits in out.logits] == [(3, VOCAB), (2, VOCAB)]
    assert len(out.routes[0]) == 2
    assert out.routes[1] == []


def test_adapters_default_to_the_bare_base(model):
    (bare,) = model([[5, 7, 9]]).logits
    assert torch.equal(bare, model([[5, 7, 9]], [None]).logits[0])


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_a_bare_decoder_is_the_stock_model(family, base_folder):
    stock = AutoModelForCausalLM.from_pretrained(base_folder(family)).eval()
    ids = random_ids(20, seed=1)
    expected = stock(torch.tensor([ids])).logits[0]
    (logits,) = MolexModel.from_pretrained(base_folder(family))([ids]).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ENCODERS)
@torch.no_grad()
def test_a_bare_encoder_is_the_stock_model(family, base_folder):
    stock = AutoModelForSequenceClassification.from_pretrained(base_folder(family)).eval().base_model
    ids = random_ids(20, seed=1)
    expected = stock(torch.tensor([ids])).last_hidden_state[0]
    (hidden,) = MolexModel.from_pretrained(base_folder(family))([ids]).logits
    torch.testing.assert_close(hidden, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_token_types_reach_the_embedding_of_bert(base_folder, tmp_path):
    model = MolexModel.from_pretrained(base_folder("bert"))
    model.load_adapter("a", saved(model, tmp_path, seed=1, molex=molex_config()))
    ids, types = random_ids(6, seed=1), [0, 0, 0, 1, 1, 1]
    stock = AutoModelForSequenceClassification.from_pretrained(base_folder("bert")).eval().base_model
    expected = stock(torch.tensor([ids]), token_type_ids=torch.tensor([types])).last_hidden_state[0]
    out = model([ids, ids], [None, "a"], token_type_ids=[types, types])
    torch.testing.assert_close(out.logits[0], expected, atol=1e-4, rtol=1e-4)
    logits, _ = Reference(base_folder("bert"))(ids, model.adapters["a"], token_type_ids=types)
    torch.testing.assert_close(out.logits[1], logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model([ids]).logits[0], expected)


@torch.no_grad()
def test_rows_may_leave_token_types_out(base_folder):
    model = MolexModel.from_pretrained(base_folder("bert"))
    ids = random_ids(4, seed=1)
    mixed = model.run([Row(ids, token_type_ids=[1] * 4), Row(ids), Row(ids, token_type_ids=[0] * 4)])
    torch.testing.assert_close(mixed.logits[1], mixed.logits[2])
    assert not torch.allclose(mixed.logits[0], mixed.logits[1])


def test_prompt_lengths_say_who_votes(decoder):
    ids = random_ids(9, seed=5)
    adapter = decoder.adapters["a"]
    reference = Reference(decoder.backbone.config.name_or_path)
    for voters in (1, 4, 9):
        logits, route = reference(ids, adapter, voters=voters)
        out = decoder([ids], ["a"], prompt_lengths=[voters])
        assert out.routes[0] == [choice.layers[0] for choice in route]
        torch.testing.assert_close(out.logits[0], logits, atol=1e-4, rtol=1e-4)


def test_top_2_routes_are_pairs(base_folder, tmp_path):
    model = MolexModel.from_pretrained(base_folder("roberta"))
    model.load_adapter("a", saved(model, tmp_path, seed=1, molex=molex_config([1, 4], top_k=2)))
    (route,) = model([[5, 7, 9]], ["a"]).routes
    assert [len(pair) for pair in route] == [2, 2]


TOO_LONG = [5] * 96  # the tiny RoBERTa takes 95 tokens

WRONG = {
    "an unknown adapter": ({"input_ids": [[5]], "adapters": ["zebra"]}, "adapter 'zebra' is not loaded"),
    "too few adapters": ({"input_ids": [[5], [6]], "adapters": ["a"]}, "adapters: 1 given for 2 requests"),
    "too few prompt lengths": (
        {"input_ids": [[5], [6]], "prompt_lengths": [1]},
        "prompt_lengths: 1 given for 2 requests",
    ),
    "too few token types": (
        {"input_ids": [[5], [6]], "token_type_ids": [[0]]},
        "token_type_ids: 1 given for 2 requests",
    ),
    "no tokens": ({"input_ids": [[5], []]}, "request 1: no tokens"),
    "too many tokens": ({"input_ids": [TOO_LONG]}, "request 0: 96 tokens, .* takes at most 95"),
    "a token beyond the vocabulary": (
        {"input_ids": [[5], [6, VOCAB]]},
        "request 1: a token id is not in 0..96",
    ),
    "a negative token": ({"input_ids": [[-1]]}, "request 0: a token id is not in 0..96"),
    "nobody votes": ({"input_ids": [[5]], "prompt_lengths": [0]}, "request 0: 0 of 1 tokens cannot vote"),
    "too many vote": ({"input_ids": [[5]], "prompt_lengths": [2]}, "request 0: 2 of 1 tokens cannot vote"),
    "token types of another length": (
        {"input_ids": [[5, 6]], "token_type_ids": [[0]]},
        "request 0: 1 token types for 2 tokens",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named(model, case):
    arguments, words = WRONG[case]
    with pytest.raises(InputError, match=words):
        model(**arguments)
    assert len(model([[5]]).logits) == 1


@pytest.mark.parametrize("family", ENCODERS)
def test_a_token_type_that_the_base_does_not_have_is_named(base_folder, family):
    with pytest.raises(InputError, match="request 0: a token type"):
        MolexModel.from_pretrained(base_folder(family))([[5, 6]], token_type_ids=[[0, 2]])


def test_token_types_are_refused_where_there_are_none(decoder):
    with pytest.raises(InputError, match="token type"):
        decoder([[5, 6]], token_type_ids=[[0, 1]])


@pytest.mark.parametrize("ids", [["a"], [None], [5.5]], ids=str)
def test_tokens_that_are_no_integers_are_named(model, ids):
    with pytest.raises(InputError, match="request 0"):
        model([ids])


@torch.no_grad()
def test_a_classification_of_one_token_runs_beside_a_generation(decoder):
    classifier = random_adapter(decoder.spec, seed=3)
    cache = decoder.new_cache(2)
    slot, alone = cache.allocate(8, 2), decoder.run([Row([5], classifier)]).logits[0]
    first = decoder.run([Row(random_ids(6, seed=1), decoder.adapters["a"], slot=slot)], cache)
    step = Row([7], decoder.adapters["a"], slot=slot, start=6, route=first.routes[0])
    together = decoder.run([step, Row([5], classifier)], cache).logits[1]
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_a_missing_base_is_named():
    with pytest.raises(BaseModelError, match=r"'./nowhere': no such folder"):
        MolexModel.from_pretrained("./nowhere")


def test_unloading_forgets_an_adapter(model):
    model.unload_adapter("a")
    assert set(model.adapters) == {"b"}
    for use in (lambda: model([[5]], ["a"]), lambda: model.unload_adapter("a")):
        with pytest.raises(InputError, match="adapter 'a' is not loaded"):
            use()


@pytest.mark.parametrize("kept", ["stacks", "bank", "prepacked"])
@pytest.mark.parametrize("forget", ["unload", "replace"])
def test_the_memory_of_an_adapter_goes_with_its_last_holder(model, tmp_path, forget, kept):
    if kept == "prepacked":
        model.prepack()
    if kept == "bank":
        model.use_bank(2**20)
    held = model.adapters["a"]
    factors = [weakref.ref(update.a) for update in held.lora.updates.values()]
    model([[5, 7], [3]], ["a", "b"])
    if forget == "unload":
        model.unload_adapter("a")
    else:
        model.load_adapter("a", tmp_path / "b")
    assert all(factor() is not None for factor in factors)
    del held
    assert [factor() for factor in factors] == [None] * len(factors)


def test_stacked_factors_serve_the_next_batch_of_the_same_adapters(model, monkeypatch):
    built = []
    monkeypatch.setattr("molex.model.BatchLora", lambda lora: built.append(lora) or BatchLora(lora))
    for names in (["a", "b"], ["a", "b", "a"], ["b", "a"], [None], ["a", "b"]):
        model([[5]] * len(names), names)
    assert [len(lora) for lora in built] == [2, 2, 1, 2]


@pytest.mark.parametrize("max_bytes", [0, 2**20])
def test_a_bank_changes_no_result(model, max_bytes):
    inputs, names = [random_ids(n, seed=n) for n in (3, 1, 6)], ["b", None, "a"]
    expected = model(inputs, names)
    model.use_bank(max_bytes)
    output = model(inputs, names)
    assert len(model.bank) == (2 if max_bytes else 0)
    assert output.routes == expected.routes
    for logits, own in zip(output.logits, expected.logits, strict=True):
        torch.testing.assert_close(logits, own, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_pass_that_has_stopped_keeps_its_slots(model):
    first, second = model.adapters["a"], model.adapters["b"]
    row = Row(random_ids(6, seed=1), first)
    expected = model.run([row]).logits[0]
    model.use_bank(sum(update.a.nbytes + update.b.nbytes for update in first.lora.updates.values()))
    stopped = model.begin([row])
    stopped.advance(2)
    model.run([Row(random_ids(3, seed=2), second)])
    assert [adapter.lora in model.bank for adapter in (first, second)] == [True, False]
    stopped.advance(stopped.depths_left)
    torch.testing.assert_close(stopped.output().logits[0], expected, atol=1e-5, rtol=1e-5)


def test_the_kernels_read_the_factors_where_the_adapters_keep_them(model):
    model.prepack()
    model.use_bank(2**20)
    model([[5, 7], [3]], ["a", "b"])
    assert (model.bank is None) == isinstance(model.backbone.layers, NativeLayers)
    assert (model.bank_bytes == 0) == (model.bank is None)


def test_the_adapters_are_read_only(model):
    assert list(model.adapters) == ["a", "b"]
    with pytest.raises(TypeError):
        model.adapters["c"] = model.adapters["a"]
    with pytest.raises(AttributeError):
        model.adapters = {}


def test_a_failed_load_changes_nothing(model, tmp_path):
    before = model.adapters["a"]
    saved(model, tmp_path / "bad", seed=9)
    (tmp_path / "bad" / "adapter_model.safetensors").write_bytes(b"")
    for name in ("a", "new"):
        with pytest.raises(AdapterError, match=r"adapter_model.safetensors"):
            model.load_adapter(name, tmp_path / "bad")
    assert set(model.adapters) == {"a", "b"}
    assert model.adapters["a"] is before


@torch.no_grad()
def test_replacing_an_adapter_does_not_touch_a_row_that_holds_the_old_one(model, tmp_path):
    row = Row([5, 7, 9], model.adapters["a"])
    before = model.run([row]).logits[0]
    replaced = model.load_adapter("a", saved(model, tmp_path / "new", seed=7, num_labels=3))
    assert model.adapters["a"] is replaced
    output = model.run([row, Row([5, 7, 9], replaced)])
    torch.testing.assert_close(output.logits[0], before, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(output.logits[1], before, atol=1e-2)
    torch.testing.assert_close(model([[5, 7, 9]], ["a"]).logits[0], output.logits[1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_last_and_all_logits_agree(decoder):
    rows = [Row(random_ids(n, seed=n), decoder.adapters["a"]) for n in (3, 1, 6)]
    every = decoder.run(rows, lm_logits="all").logits
    last = decoder.run(rows).logits
    for logits, final in zip(every, last, strict=True):
        torch.testing.assert_close(logits[-1], final, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_statistics_of_a_pass(model):
    rows = [Row([5, 7, 9], model.adapters[name]) for name in ("a", "b", "a")]
    output = model.run([*rows, Row([4, 2])])
    assert (output.stats.tokens, output.stats.distinct_adapters) == (11, 3)
    other = [
        c.layers[0] for depth, c in zip((0, 1, 2), output.routes[0], strict=True) if c.layers[0] != depth
    ]
    assert output.stats.distinct_layers == len(other)
    assert output.balance_loss == 0


@pytest.mark.parametrize("gate_gradient", ["none", "straight_through"])
def test_the_task_loss_reaches_the_gate_only_straight_through(base_folder, gate_gradient):
    model = MolexModel.from_pretrained(base_folder("roberta"))
    molex = molex_config([0, 2], gate_gradient=gate_gradient)
    config = adapter_config(model.spec, molex=molex)
    adapter = new_adapter(model.spec, config, num_labels=2, mix=(0.6, 0.4), seed=1)
    output = model.run([Row(random_ids(5, seed=n), adapter) for n in range(3)])
    torch.stack(output.logits).square().sum().backward(retain_graph=True)
    parameters = adapter.parameters()
    gate = parameters["molex.gate.weight"]
    reached = gate.grad is not None and bool(gate.grad.any())
    assert reached == (gate_gradient == "straight_through")
    assert all(p.grad.any() for name, p in parameters.items() if "classifier" in name)
    assert all(p.grad.any() for name, p in parameters.items() if "lora_B" in name)
    gate.grad = None
    output.balance_loss.backward()
    assert gate.grad.any()
    assert all(not p.requires_grad for layer in model.backbone.layers.blocks for p in layer.parameters())
