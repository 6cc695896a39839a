"""Gates against their formulas, written out token by token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molex.gate import CosineGate, LinearGate

LAYERS, SIZE, WIDTH = 5, 8, 3


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine_gate(axis="features", temperature=1.0):
    weights = randn(WIDTH, SIZE, seed=1), randn(WIDTH, seed=2), randn(WIDTH, LAYERS, seed=3)
    return CosineGate(*weights, torch.tensor([temperature]), axis)


def test_linear_gate_is_an_affine_map_of_each_token():
    gate = LinearGate(randn(LAYERS, SIZE, seed=1), randn(LAYERS, seed=2))
    hidden = randn(4, SIZE, seed=3)
    expected = torch.stack([gate.weight @ token + gate.bias for token in hidden])
    torch.testing.assert_close(gate.logits(hidden, [1, 3]), expected)


def test_cosine_gate_compares_directions():
    gate, hidden = cosine_gate(temperature=0.5), randn(4, SIZE, seed=4)
    logits = gate.logits(hidden, [4])
    for token, row in zip(hidden, logits, strict=True):
        projected = gate.weight @ token + gate.bias
        for layer, value in enumerate(row):
            column = gate.similarity[:, layer]
            cosine = projected @ column / (projected.norm() * column.norm())
            torch.testing.assert_close(value, cosine * math.exp(0.5))


def test_sequence_axis_normalises_along_the_tokens_of_a_request():
    gate, hidden = cosine_gate("sequence"), randn(4, SIZE, seed=4)
    projected = hidden @ gate.weight.T + gate.bias
    unit = projected / projected.square().sum(dim=0).sqrt()
    columns = gate.similarity / gate.similarity.square().sum(dim=0).sqrt()
    torch.testing.assert_close(gate.logits(hidden, [4]), unit @ columns * math.e)


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), seed=st.integers(0, 100))
@pytest.mark.parametrize("axis", ["features", "sequence"])
def test_a_request_is_judged_by_its_own_tokens_only(axis, lengths, seed):
    gate, hidden = cosine_gate(axis), randn(sum(lengths), SIZE, seed=seed)
    together = gate.logits(hidden, lengths)
    alone = [gate.logits(request, [len(request)]) for request in hidden.split(lengths)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_temperature_is_capped_at_one_hundred():
    hidden = randn(4, SIZE, seed=4)
    capped = cosine_gate(temperature=50.0).logits(hidden, [4])
    torch.testing.assert_close(capped, cosine_gate(temperature=math.log(100)).logits(hidden, [4]))
    assert capped.abs().max() <= 100.001


def test_a_hidden_state_of_zero_gives_finite_logits():
    gate = cosine_gate()
    gate.bias.zero_()
    assert gate.logits(torch.zeros(2, SIZE), [2]).isfinite().all()


@pytest.mark.parametrize(
    "gate", [LinearGate(randn(LAYERS, SIZE), randn(LAYERS)), cosine_gate()], ids=["linear", "cosine"]
)
def test_gates_compute_in_their_own_precision(gate):
    assert gate.logits(randn(3, SIZE).bfloat16(), [3]).dtype == torch.float32


def test_tensors_are_named_as_in_the_adapter_file():
    assert list(LinearGate(randn(LAYERS, SIZE), randn(LAYERS)).tensors()) == ["weight", "bias"]
    names = ["projector.weight", "projector.bias", "similarity", "temperature"]
    assert list(cosine_gate().tensors()) == names
