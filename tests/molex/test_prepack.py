"""Prepacked weights give what plain weights give, for every number of rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molex import BARE, MolexModel, Row
from molex.native import build
from molex.prepack import PrepackedLinear, can_prepack, padded_rows
from tests.tiny import DECODERS, ENCODERS, molex_config, random_adapter, random_ids

CPU = torch.device("cpu")
# Float32 sums in another order; bfloat16 rounds each of some ten results a layer by 4e-3.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.35}


@given(st.integers(0, 100_000))
def test_padding_is_small(rows):
    padded = padded_rows(rows)
    assert rows <= padded
    assert padded - rows < max(8, rows / 16 + 1)


def test_sizes_are_few():
    assert len({padded_rows(rows) for rows in range(4096)}) < 120


@pytest.mark.parametrize("family", ENCODERS + DECODERS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@torch.no_grad()
def test_a_prepacked_model_answers_alike(base_folder, family, dtype, monkeypatch):
    monkeypatch.setattr(build, "why_not", lambda dtype, device: "are not used here")
    plain, prepacked = (MolexModel.from_pretrained(base_folder(family), dtype=dtype) for _ in range(2))
    prepacked.prepack()
    task = "CAUSAL_LM" if plain.spec.generates else "SEQ_CLS"
    adapters = [BARE] + [
        random_adapter(plain.spec, seed=n, task=task, molex=molex)
        for n, molex in enumerate([None, molex_config(), molex_config([1, 2], top_k=2)])
    ]
    rows = [Row(random_ids(5 + 7 * n, seed=n), adapters[n % len(adapters)]) for n in range(9)]
    routes = plain.run(rows).routes
    for row, route in zip(rows, routes, strict=True):
        row.route = route
    expected, given = plain.run(rows, lm_logits="all"), prepacked.run(rows, lm_logits="all")
    for one, other in zip(expected.logits, given.logits, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_a_prepacked_layer_refuses_gradients():
    layer = PrepackedLinear(torch.nn.Linear(4, 3))
    with pytest.raises(RuntimeError, match="prepacked for inference"):
        layer(torch.ones(1, 2, 4, requires_grad=True))


def test_float64_is_left_as_it_is(base_folder):
    assert not can_prepack(torch.float64, CPU)
    model = MolexModel.from_pretrained(base_folder("roberta"), dtype=torch.float64)
    model.prepack()
    assert model([[5, 6]]).logits[0].dtype == torch.float64
