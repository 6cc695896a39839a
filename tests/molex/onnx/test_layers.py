"""Layers on ONNX Runtime give what transformers' modules give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from molex import BARE, MolexModel, Row
from molex.backends import Wanted, graphs_of
from molex.errors import BaseModelError
from molex.generate import generate
from molex.lora import AdaptedLinear
from molex.native.weights import GROUP, rounded
from molex.onnx.layers import OnnxLayers, OnnxVocabulary, alone
from molex.onnx.sessions import Session
from molex.prepack import weight_and_bias
from molex.routing import flat_route
from molex.stage import Stage
from tests.batches import mixed_rows, relative_error
from tests.molex.native.kernels import CPU, threads
from tests.tiny import DECODERS, ENCODERS, POSITIONS, random_adapter, random_ids

# Of the length of a vector of logits. Float32: sums in another order. In few bits rows are rounded to bytes
# before they are multiplied; what weights lose is lost on both sides.
TOLERANCE = {None: 1e-5, 8: 0.1, 4: 0.1}
LENGTHS = [5, 1, 23, POSITIONS - 2, 2, 64, 65, 3]


def pair(folder, **weights):
    """The same base on transformers' modules and on ONNX Runtime."""
    stock, onnx = (MolexModel.from_pretrained(folder) for _ in range(2))
    onnx.prepack(backend="onnx", **weights)
    assert isinstance(onnx.backbone.layers, OnnxLayers)
    assert onnx.runs_on == "ONNX Runtime"
    return stock, onnx


def round_weights(model, bits):
    """What weights of so many bits stand for, instead of a model's own."""
    for module in (module for block in model.backbone.stock_blocks for module in block.modules()):
        if isinstance(module, AdaptedLinear) and bits is not None:
            weight, _ = weight_and_bias(module.base)
            for group in weight.split(GROUP if bits == 4 else weight.shape[1], dim=1):
                numbers, scales = rounded(group[:, None], 2 ** (bits - 1) - 1, torch.float32)
                group.copy_(numbers[:, 0] * scales)


def assert_alike(stock, onnx, rows, tolerance):
    """Routes are pinned: a vote on rounded hidden states may rightly end otherwise."""
    for row, route in zip(rows, stock.run(rows).routes, strict=True):
        row.route = route
    expected, given = (model.run(rows, lm_logits="all").logits for model in (stock, onnx))
    for one, other in zip(expected, given, strict=True):
        assert other.shape == one.shape
        assert relative_error(other, one) <= tolerance


@pytest.mark.parametrize("bits", TOLERANCE)
@pytest.mark.parametrize("family", ENCODERS + DECODERS)
@torch.inference_mode()
def test_they_answer_as_transformers_does(family, bits, base_folder):
    stock, onnx = pair(base_folder(family), bits=bits)
    round_weights(stock, bits)
    for lengths in ([1], [7], LENGTHS, [9] * 40):
        assert_alike(stock, onnx, mixed_rows(stock, lengths), TOLERANCE[bits])


@settings(max_examples=20)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), data=st.data())
@torch.inference_mode()
def test_any_batch_gives_the_same_routes_and_logits(base_folder, lengths, data):
    stock, onnx = pair(base_folder(data.draw(st.sampled_from(["roberta", "llama"]))))
    rows = mixed_rows(stock, lengths)
    expected, given = ([flat_route(route) for route in m.run(rows).routes] for m in (stock, onnx))
    assert given == expected
    assert_alike(stock, onnx, rows, TOLERANCE[None])


@pytest.mark.parametrize("bits", TOLERANCE)
@torch.inference_mode()
def test_a_row_gets_what_it_gets_alone(bits, base_folder):
    _, onnx = pair(base_folder("roberta"), bits=bits)
    rows = mixed_rows(onnx, LENGTHS)
    for row, together in zip(rows, onnx.run(rows).logits, strict=True):
        # Sums in another order, and a byte that is rounded the other way for it.
        assert relative_error(onnx.run([row]).logits[0], together) <= (1e-5 if bits is None else 1e-2)


@pytest.mark.parametrize("bits", [8, 4])
@torch.inference_mode()
def test_the_routed_branch_alone_has_few_bits(bits, base_folder):
    stock, onnx = pair(base_folder("roberta"), routed_bits=bits)
    assert_alike(stock, onnx, [Row(random_ids(20, seed=1), BARE)], TOLERANCE[None])
    rows = mixed_rows(stock, [5, 9, 23, 7, 7, 7])
    assert_alike(stock, onnx, rows, {8: 0.1, 4: 0.9}[bits])
    assert not torch.equal(stock.run(rows).logits[2], onnx.run(rows).logits[2])
    assert onnx.nbytes > pair(base_folder("roberta"))[1].nbytes


@pytest.mark.parametrize("family", DECODERS)
def test_generations_are_the_same(family, base_folder):
    stock, onnx = pair(base_folder(family))
    adapter = random_adapter(stock.spec, seed=2, r=8, task="CAUSAL_LM")
    prompts = [random_ids(n, seed=n) for n in (3, 17, 1)]
    assert generate(onnx, prompts, adapter) == generate(stock, prompts, adapter)


@pytest.mark.parametrize("family", DECODERS)
def test_the_weights_of_a_vocabulary_stay_where_they_are(family, base_folder):
    stock, onnx = pair(base_folder(family))
    assert isinstance(onnx.backbone.lm_head, OnnxVocabulary)
    outside = [model.nbytes - model.backbone.layers.nbytes for model in (stock, onnx)]
    assert outside[0] == outside[1]
    hidden = torch.randn(2, 3, stock.spec.hidden_size)
    expected, given = (model.backbone.lm_head(hidden) for model in (stock, onnx))
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)
    assert onnx.backbone.lm_head(hidden[:0]).shape == (0, 3, stock.spec.vocab_size)


def test_memory_counts_what_is_kept(base_folder):
    stock, onnx = pair(base_folder("gpt2"))
    kept = sum(p.nbytes for block in onnx.backbone.stock_blocks for p in block.parameters())
    assert 0 < kept < sum(p.nbytes for block in stock.backbone.stock_blocks for p in block.parameters()) / 10
    # A tiny base has graphs of as many kilobytes as weights; no weight is there twice.
    graphs, _ = graphs_of(Wanted(stock.backbone.layers, stock.backbone.family, stock.backbone.config))
    assert onnx.backbone.layers.nbytes == sum(len(graph) for halves in graphs for graph in halves)


@torch.inference_mode()
def test_no_row_at_all_is_nothing_to_do(base_folder):
    _, onnx = pair(base_folder("roberta"))
    assert onnx.run([]).logits == []
    hidden = torch.empty(0, onnx.spec.hidden_size)
    assert len(onnx.backbone.layers.project(Stage.of_the_base(0, CPU), [0], hidden)) == 0


def test_pytorch_computes_on_the_calling_thread_meanwhile():
    with threads(2):
        with alone():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"routed_dtype": torch.bfloat16}], ids=str)
def test_other_precisions_are_refused(options, base_folder):
    model = MolexModel.from_pretrained(base_folder("roberta"), **options)
    with pytest.raises(BaseModelError, match="ONNX Runtime cannot run the layers: it computes in float32"):
        model.prepack(backend="onnx")


def test_an_unknown_function_is_refused(base_folder):
    model = MolexModel.from_pretrained(base_folder("roberta"))
    model.backbone.config.hidden_act = "mish"
    with pytest.raises(BaseModelError, match="it does not know the function mish"):
        model.prepack(backend="onnx")


def test_sessions_run_graphs_with_one_output(base_folder):
    backbone = MolexModel.from_pretrained(base_folder("llama")).backbone
    assert isinstance(backbone.lm_head, nn.Linear)
    _, vocabulary = graphs_of(Wanted(backbone.layers, backbone.family, backbone.config))
    session = Session(vocabulary)
    assert session.width == backbone.spec.vocab_size
    assert session.widths == {"hidden": backbone.spec.hidden_size, "weight": backbone.spec.hidden_size}
