"""Steps of running generations as one piece of work give what a pass gives, and what the reference gives."""

from __future__ import annotations

import weakref

import pytest
import torch

from molex.decoding import Decoding
from molex.grouped.decoding import GroupedDecoding
from molex.routing import Choice, sole_choice
from tests.batches import Generations, assert_steps_equal_the_full_forward, generators, relative_error
from tests.molex.grouped.grouping import NoWaiting, grouped, moved
from tests.tiny import DECODERS

# Of all logits together. The two ways round in other places: in bfloat16, where a unit in the last place is
# 2^-8, 0.025 was seen.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}


@torch.inference_mode()
@pytest.mark.parametrize("family", DECODERS)
def test_steps_equal_the_full_forward(family, base_folder, monkeypatch):
    assert_steps_equal_the_full_forward(grouped(base_folder(family), monkeypatch), base_folder(family))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", DECODERS)
def test_steps_equal_those_of_a_pass(family, dtype, base_folder, monkeypatch):
    model = grouped(base_folder(family), monkeypatch, dtype)
    adapters = [generators(model)[i % 5] for i in range(23)]
    running = Generations(model, adapters, [1 + i % 33 for i in range(23)])
    for step in range(3):
        running.grow(step)
        rows = running.rows()
        expected = model._run_pass(rows, running.cache, "last")
        given = model.run(rows, running.cache)
        assert isinstance(model._decoding, Decoding)
        assert isinstance(model._decoding._steps, GroupedDecoding)
        assert (given.stats, given.routes) == (expected.stats, expected.routes)
        for one, other in zip(given.logits, expected.logits, strict=True):
            assert one.dtype == other.dtype == dtype
            assert relative_error(one, other) < TOLERANCE[dtype]


@torch.inference_mode()
def test_factors_outlive_their_batch_and_not_their_generations(base_folder, monkeypatch):
    """A graph reads them where they are, while other batches come and go."""
    model = grouped(base_folder("llama"), monkeypatch)
    running = Generations(model, generators(model), [3, 4, 5, 6, 7])
    running.grow(0)
    model.run(running.rows(), running.cache)
    factors = weakref.ref(next(f for f in model.backbone.layers.factors_of(model._stacks.lora) if f))
    others = Generations(model, generators(model)[1:3], [2, 9])
    assert factors() is not None
    running.grow(1)
    expected = model._run_pass(running.rows(), running.cache, "last")
    given = model.run(running.rows(), running.cache)
    for one, other in zip(given.logits, expected.logits, strict=True):
        assert relative_error(one, other) < TOLERANCE[torch.float32]
    others.grow(0)
    model.run(others.rows(), others.cache)
    assert factors() is None


def any_choice(adapter):
    return sole_choice(1) if adapter.molex.top_k == 1 else Choice((3, 1), (0.7, 0.3))


@torch.no_grad()
@pytest.mark.parametrize("family", DECODERS)
def test_a_step_neither_waits_nor_leaves_the_device(family, base_folder, monkeypatch):
    model = grouped(base_folder(family), monkeypatch, torch.bfloat16, "meta")
    adapters = [moved(adapter, model) for adapter in generators(model)]
    routes = [tuple(any_choice(adapter) for _ in adapter.gates) for adapter in adapters]
    running = Generations(model, adapters, [3, 15, 1, 31, 13], routes)
    running.grow(0)
    rows = running.rows()
    with NoWaiting():
        output = model.run(rows, running.cache)
        assert model.run(rows, running.cache).logits[0].device.type == "meta"
    assert [len(logits) for logits in output.logits] == [model.spec.vocab_size] * 5
