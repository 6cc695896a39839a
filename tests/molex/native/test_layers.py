"""Layers on the kernels give what transformers' modules give."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molex import BARE, MolexModel, Row, read_adapter, write_adapter
from molex.adapter import new_adapter
from molex.errors import BaseModelError
from molex.gate import LinearGate
from molex.lora import AdaptedLinear, BatchLora
from molex.native import build
from molex.native.layers import FactorTable, NativeLayers
from molex.native.weights import GROUP
from molex.prepack import weight_and_bias
from molex.routing import flat_route
from molex.stage import Stage
from tests.molex.native.kernels import CPU, needs_kernels, threads
from tests.tiny import (
    DECODERS,
    ENCODERS,
    LAYERS,
    POSITIONS,
    adapter_config,
    molex_config,
    random_adapter,
    random_ids,
    tiny_base,
)

pytestmark = needs_kernels

# Of the length of a vector of logits. Float32: sums in another order, and erf to 1.5e-7. Bfloat16 keeps 8
# bits of some ten results a layer, and the kernels round fewer of them than transformers does. Where weights
# have few bits, rows are rounded to 8 before they are multiplied; what weights lose is lost on both sides.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.08}
TOLERANCE_BITS = 0.12


def pair(folder, dtype=torch.float32, routed=None, **weights):
    """The same base on transformers' modules and on the kernels."""
    stock, native = (MolexModel.from_pretrained(folder, dtype, routed_dtype=routed) for _ in range(2))
    native.prepack(**weights)
    assert isinstance(native.backbone.layers, NativeLayers)
    return stock, native


def mixed_rows(model, lengths):
    """Bare, LoRA and MoLEx rows of several ranks, in turn."""
    task = "CAUSAL_LM" if model.spec.generates else "SEQ_CLS"
    adapters = [BARE] + [
        random_adapter(model.spec, seed=n, r=r, task=task, molex=molex)
        for n, (r, molex) in enumerate(
            [(3, None), (8, molex_config()), (5, molex_config([1, 3], top_k=2)), (1, molex_config([0, 4]))]
        )
    ]
    return [Row(random_ids(n, seed=n), adapters[i % len(adapters)]) for i, n in enumerate(lengths)]


def pin_routes(model, rows):
    """A vote on rounded hidden states may rightly end otherwise."""
    for row, route in zip(rows, model.run(rows).routes, strict=True):
        row.route = route


def assert_alike(stock, native, rows, tolerance):
    expected, given = (model.run(rows, lm_logits="all") for model in (stock, native))
    for one, other in zip(expected.logits, given.logits, strict=True):
        assert other.dtype == one.dtype
        assert other.shape == one.shape
        assert (other.float() - one.float()).norm() <= tolerance * one.float().norm()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", ENCODERS + DECODERS)
@torch.inference_mode()
def test_they_answer_as_transformers_does(family, dtype, count, base_folder):
    stock, native = pair(base_folder(family), dtype)
    longest = POSITIONS - 2
    for lengths in ([1], [7], [longest], [5, 1, 23, longest, 2, 64, 65, 3], [9] * 120):
        rows = mixed_rows(stock, lengths)
        pin_routes(stock, rows)
        with threads(count):
            assert_alike(stock, native, rows, TOLERANCE[dtype])


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), data=st.data())
@torch.inference_mode()
def test_any_batch_gives_the_same_routes_and_logits(base_folder, lengths, data):
    stock, native = pair(base_folder(data.draw(st.sampled_from(["roberta", "llama"]))))
    rows = mixed_rows(stock, lengths)
    expected, given = ([flat_route(route) for route in m.run(rows).routes] for m in (stock, native))
    assert given == expected
    assert_alike(stock, native, rows, TOLERANCE[torch.float32])


ODD_SIZES = {
    "bert": {"hidden_size": 30, "num_attention_heads": 5, "intermediate_size": 51},
    "llama": {"hidden_size": 42, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 71},
}


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", ODD_SIZES)
@torch.inference_mode()
def test_sizes_need_be_no_multiples_of_anything(family, dtype, bits, tmp_path):
    stock, native = pair(tiny_base(family, tmp_path, **ODD_SIZES[family]), dtype, bits=bits)
    if bits is not None:
        round_weights(stock.backbone.stock_blocks, bits)
    rows = mixed_rows(stock, [5, 1, 23, 2, 64, 65, 3])
    pin_routes(stock, rows)
    assert_alike(stock, native, rows, TOLERANCE[dtype] if bits is None else TOLERANCE_BITS)


def round_weights(blocks, bits):
    """What weights of so many bits stand for, instead of the weights of blocks."""
    for module in (module for block in blocks for module in block.modules()):
        if isinstance(module, AdaptedLinear):
            weight, _ = weight_and_bias(module.base)
            groups = weight.float().split(weight.shape[1] if bits == 8 else GROUP, dim=1)
            steps = [group.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1) for group in groups]
            if bits == 4:
                steps = [step.bfloat16().float() for step in steps]
            rounded = [(group / step).round() * step for group, step in zip(groups, steps, strict=True)]
            weight.copy_(torch.cat(rounded, dim=1))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", ENCODERS + DECODERS)
@torch.inference_mode()
def test_weights_of_few_bits_answer_as_rounded_ones_do(family, dtype, bits, base_folder):
    stock, native = pair(base_folder(family), dtype, bits=bits)
    round_weights(stock.backbone.stock_blocks, bits)
    rows = mixed_rows(stock, [5, 1, 23, 2, 64, 65, 3])
    pin_routes(stock, rows)
    assert_alike(stock, native, rows, TOLERANCE_BITS)


@pytest.mark.parametrize("bits", [8, 4])
@torch.inference_mode()
def test_the_routed_branch_alone_has_few_bits(bits, base_folder):
    stock, _ = pair(base_folder("roberta"), routed=torch.bfloat16)
    _, native = pair(base_folder("roberta"), routed_bits=bits)
    round_weights(stock.backbone.layers.blocks[LAYERS:], bits)
    bare = Row(random_ids(20, seed=1), BARE)
    assert_alike(stock, native, [bare], TOLERANCE[torch.float32])
    rows = mixed_rows(stock, [5, 9, 23])
    pin_routes(stock, rows)
    assert_alike(stock, native, rows, TOLERANCE_BITS)
    assert not torch.equal(stock.run(rows).logits[2], native.run(rows).logits[2])


@pytest.mark.parametrize("dtypes", list(itertools.permutations(TOLERANCE)), ids=str)
@pytest.mark.parametrize("family", ["roberta", "llama"])
@torch.inference_mode()
def test_the_routed_branch_alone_has_another_precision(family, dtypes, base_folder):
    stock, native = pair(base_folder(family), *dtypes)
    rows = mixed_rows(stock, [5, 1, 23, 2, 64, 65, 3])
    pin_routes(stock, rows)
    assert_alike(stock, native, rows, TOLERANCE[torch.bfloat16])
    exact, _ = pair(base_folder(family), dtypes[0])
    assert_alike(exact, native, [Row(random_ids(20, seed=1), BARE)], TOLERANCE[dtypes[0]])


@torch.inference_mode()
def test_a_row_that_is_not_finite_spoils_no_other(base_folder):
    for bits in (None, 8, 4):
        stock, native = pair(base_folder("roberta"), bits=bits)
        broken = random_adapter(stock.spec, seed=1)
        for update in broken.lora.updates.values():
            update.b.fill_(torch.inf)
        rows = [Row(random_ids(6, seed=n), adapter) for n, adapter in enumerate([BARE, broken, BARE])]
        first, spoilt, last = native.run(rows).logits
        assert not spoilt.isfinite().all()
        assert first.isfinite().all()
        assert last.isfinite().all()


def test_memory_counts_what_is_kept(base_folder):
    stock, native = pair(base_folder("gpt2"), bits=8)
    assert native.nbytes < stock.nbytes
    _, both = pair(base_folder("gpt2"), routed_bits=8)
    assert both.nbytes > native.nbytes
    _, fewer = pair(base_folder("gpt2"), bits=4)
    assert fewer.nbytes < native.nbytes


def test_weights_are_not_kept_twice(base_folder):
    stock, native = pair(base_folder("gpt2"))
    kept = sum(p.nbytes for block in native.backbone.stock_blocks for p in block.parameters())
    assert 0 < kept < sum(p.nbytes for block in stock.backbone.stock_blocks for p in block.parameters()) / 10


def test_no_row_at_all_is_nothing_to_do(base_folder):
    _, native = pair(base_folder("roberta"))
    assert native.run([]).logits == []
    stage = Stage.of_the_base(0, CPU)
    hidden = torch.empty(0, native.spec.hidden_size)
    assert len(native.backbone.layers.project(stage, [0], hidden)) == 0


@pytest.mark.parametrize(
    ("numbers", "hidden", "message"),
    [
        ([5], torch.zeros(2, 32), "no such layer"),
        ([0], torch.zeros(1, 32), "no row 1"),
        ([0], torch.zeros(2, 31), "width"),
        ([0], torch.zeros(2, 32, dtype=torch.bfloat16), "type"),
    ],
)
def test_what_lies_outside_is_refused(base_folder, numbers, hidden, message):
    _, native = pair(base_folder("roberta"))
    stage = Stage.of_the_base(2, CPU)
    with pytest.raises(RuntimeError, match=message):
        native.backbone.layers.project(stage, numbers, hidden)


def test_an_adapter_out_of_the_batch_is_refused(base_folder):
    _, native = pair(base_folder("roberta"))
    plain = Stage.of_the_base(2, CPU)
    stage = Stage(plain.rows, plain.tokens, [2], [2], [[(1, 0, 2)]], BatchLora([]))
    with pytest.raises(RuntimeError, match="no adapter 1"):
        native.backbone.layers.project(stage, [0], torch.zeros(2, 32))


def test_few_bits_need_the_kernels(base_folder, monkeypatch):
    model = MolexModel.from_pretrained(base_folder("roberta"))
    monkeypatch.setattr(build, "why_not", lambda dtype, device: "need a CPU with AVX2")
    with pytest.raises(BaseModelError, match="8-bit weights need the kernels, which need a CPU with AVX2"):
        model.prepack(bits=8, backend="kernels")


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ((4, 0, 8), "evenly"),
        ((4, 3, 8), "evenly"),
        ((4, 4, 16), "no 4 and 4 heads of 16"),
        ((2, 2, 8), "no 2"),
    ],
)
def test_heads_that_the_layers_have_not_are_refused(base_folder, heads, message):
    _, native = pair(base_folder("roberta"))
    with pytest.raises(RuntimeError, match=message):
        torch.classes.molex.Decoding(native.backbone.layers.packed, 1, *heads, 1.0, 0)


@torch.no_grad()
def test_an_adapter_in_training_is_read_as_it_is_by_now(base_folder):
    stock, native = pair(base_folder("bert"))
    config = adapter_config(native.spec, molex=molex_config())
    adapter = new_adapter(native.spec, config, num_labels=3, seed=1)
    row = Row(random_ids(9, seed=1), adapter)
    for _ in range(3):
        for tensor in adapter.parameters().values():
            tensor += 0.1 * torch.randn_like(tensor)
        assert_alike(stock, native, [row], TOLERANCE[torch.float32])


@pytest.mark.parametrize("part", ["weight", "bias"])
@torch.inference_mode()
def test_gates_that_lie_otherwise_run_on_pytorch(base_folder, part):
    stock, native = pair(base_folder("bert"))
    adapter = random_adapter(native.spec, seed=1, molex=molex_config())
    tensors = {"weight": adapter.gates[0].weight, "bias": torch.tensor([0.0] * (LAYERS - 1) + [100.0])}
    tensors[part] = tensors[part].repeat_interleave(2, dim=-1)[..., ::2]
    adapter = replace(adapter, gates=dict.fromkeys(adapter.gates, LinearGate(**tensors)))
    row = Row(random_ids(9, seed=1), adapter)
    assert flat_route(native.run([row]).routes[0]) == flat_route(stock.run([row]).routes[0])


@pytest.mark.parametrize("token", [-1, 3])
def test_a_gate_of_a_row_that_is_not_there_is_refused(token):
    with pytest.raises(RuntimeError, match=f"no row {token}"):
        torch.ops.molex.gate_logits(
            torch.zeros(3, 8), torch.tensor([token]), [1], [torch.zeros(5, 8)], [torch.zeros(5)]
        )


def test_factors_of_a_folder_are_read_where_they_lie(base_folder, tmp_path):
    _, native = pair(base_folder("roberta"))
    write_adapter(random_adapter(native.spec, seed=1), tmp_path)
    lora = read_adapter(tmp_path, native.spec).lora
    addresses = (
        FactorTable(lora, native.spec.modules, native.spec.num_layers).fields[:, :2].flatten().tolist()
    )
    own = {factor.data_ptr() for update in lora.updates.values() for factor in (update.a, update.b)}
    assert own == {address for address in addresses if address}
