"""Rows by layer: the products of each row are those of its own layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from molex.grouped.low_rank import MAX_GROUPS, BatchFactors, PartFactors
from molex.grouped.rows import LayerRows, Segments
from molex.lora import BatchLora, LoraWeights, LowRank
from molex.stage import Stage

CPU = torch.device("cpu")
LAYERS, INPUTS = 4, 16
MODULES = {"query": (INPUTS, 8), "value": (INPUTS, 24)}
OUTPUTS = 32

calls_of_runs = st.lists(
    st.tuples(
        st.integers(0, LAYERS - 1), st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5)), min_size=1)
    ),
    min_size=1,
    max_size=6,
)


def stage_of(calls):
    """One call of each layer on runs of (member, length)."""
    runs, counts = [], []
    for _, pieces in calls:
        ends = torch.tensor([length for _, length in pieces]).cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        runs.append([(m, start, end) for (m, _), start, end in zip(pieces, starts, ends, strict=True)])
        counts.append(ends[-1])
    rows = torch.arange(sum(counts))
    return Stage(rows.numpy(), rows, counts, counts, runs, BatchLora([LoraWeights()] * 3))


def rows_of(calls, numbers):
    stage = stage_of(calls)
    return LayerRows.of(stage, Segments(stage, CPU), numbers, LAYERS)


def adapters(generator, *, without=2):
    """Three adapters of ranks 1, 3 and 9; one of them updates one module in one layer alone."""
    found = []
    for member, rank in enumerate((1, 3, 9)):
        updates = {
            (layer, name): LowRank(
                torch.randn(rank, INPUTS, generator=generator),
                torch.randn(width, rank, generator=generator),
                scaling=0.5 + member,
            )
            for layer in range(LAYERS)
            for name, (_, width) in MODULES.items()
            if member != without or (layer, name) == (1, "value")
        }
        found.append(LoraWeights(updates))
    return found


def factors_of(loras):
    like = torch.zeros(0)
    return BatchFactors([PartFactors(lora, MODULES, LAYERS, like) for lora in loras])


def updated(y, x, calls, loras):
    """The definition, row by row."""
    expected, row = y.clone(), 0
    for layer, pieces in calls:
        for member, length in pieces:
            for _ in range(length):
                first = 0
                for name, (_, width) in MODULES.items():
                    update = loras[member].updates.get((layer, name))
                    if update is not None:
                        expected[row, first : first + width] += update.scaling * (
                            update.b @ update.a @ x[row]
                        )
                    first += width
                row += 1
    return expected


@settings(max_examples=40, deadline=None)
@given(calls=calls_of_runs, seed=st.integers(0, 2**16), on_device=st.booleans())
def test_each_row_meets_its_layer_and_its_adapter(calls, seed, on_device):
    generator = torch.Generator().manual_seed(seed)
    numbers = [layer for layer, _ in calls]
    rows = rows_of(calls, torch.tensor(numbers) if on_device else numbers)
    layers = torch.tensor([layer for layer, pieces in calls for _, n in pieces for _ in range(n)])
    x = torch.randn(len(layers), INPUTS, generator=generator)
    weight = torch.randn(LAYERS, OUTPUTS, INPUTS, generator=generator)
    bias = torch.randn(LAYERS, OUTPUTS, generator=generator)
    given = rows.sorted(x)
    y = rows.linear(given, weight, bias)
    expected = torch.stack([weight[n] @ row + bias[n] for n, row in zip(layers, x, strict=True)])
    torch.testing.assert_close(rows.restored(y), expected, atol=1e-4, rtol=1e-4)
    loras = adapters(generator)
    y = factors_of(loras).add(y, given, rows)
    torch.testing.assert_close(rows.restored(y), updated(expected, x, calls, loras), atol=1e-3, rtol=1e-4)


def test_more_segments_than_a_product_takes_go_row_by_row(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    pieces = [(n % 3, 1 + n % 2) for n in range(MAX_GROUPS + 5)]
    calls = [(1, pieces[: MAX_GROUPS // 2]), (0, pieces[MAX_GROUPS // 2 :])]
    rows, loras = rows_of(calls, [1, 0]), adapters(generator)
    x = torch.randn(sum(length for _, length in pieces), INPUTS, generator=generator)
    monkeypatch.setattr(functional, "grouped_mm", None)
    y = factors_of(loras).add(torch.zeros(len(x), OUTPUTS), rows.sorted(x), rows)
    expected = updated(torch.zeros(len(x), OUTPUTS), x, calls, loras)
    torch.testing.assert_close(rows.restored(y), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_adapters_broken_factors_reach_no_other_row(bad):
    generator = torch.Generator().manual_seed(2)
    calls = [(0, [(0, 2), (1, 3)]), (1, [(1, 1), (0, 2)])]
    loras = adapters(generator)
    loras[0].updates[0, "query"].b.fill_(bad)
    x = torch.randn(8, INPUTS, generator=generator)
    rows = rows_of(calls, [0, 1])
    y = rows.restored(factors_of(loras).add(torch.zeros(8, OUTPUTS), rows.sorted(x), rows))
    assert not y[:2, :8].isfinite().any()
    assert y[2:].isfinite().all()


def test_adapters_that_update_nothing_add_nothing():
    bare = LoraWeights()
    rows = rows_of([(2, [(0, 3)])], [2])
    assert PartFactors(bare, MODULES, LAYERS, torch.zeros(0)).rank == 0
    mixed = factors_of([bare, *adapters(torch.Generator().manual_seed(3))[:2]])
    assert torch.equal(mixed.add(torch.ones(3, OUTPUTS), torch.ones(3, INPUTS), rows), torch.ones(3, OUTPUTS))
