"""Steps of running generations on the kernels give what a pass gives, and what the reference gives."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from molex import BARE, MolexModel, Row
from molex.decoding import Decoding
from molex.reference import Reference
from tests.batches import Generations, assert_steps_equal_the_full_forward, generators, relative_error
from tests.molex.native.kernels import needs_kernels, threads
from tests.molex.native.test_layers import TOLERANCE, TOLERANCE_BITS
from tests.tiny import DECODERS, molex_config, random_adapter, random_ids, tiny_base

pytestmark = needs_kernels


@pytest.fixture(scope="module", params=DECODERS)
def folder(request, tmp_path_factory):
    return tiny_base(request.param, tmp_path_factory.mktemp(request.param))


def packed(folder, dtype=torch.float32, **weights):
    model = MolexModel.from_pretrained(folder, dtype)
    model.prepack(**weights)
    return model


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2])
def test_steps_equal_the_full_forward(folder, count):
    with threads(count):
        assert_steps_equal_the_full_forward(packed(folder), folder)


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("weights", [{}, {"routed_bits": 8}, {"bits": 8, "routed_bits": 4}])
def test_steps_equal_those_of_a_pass(folder, dtype, weights):
    """In the same precision; the pages that a step has written are read by a pass afterwards."""
    model = packed(folder, dtype, **weights)
    tolerance = TOLERANCE_BITS if weights else TOLERANCE[dtype]
    # More rows than a block takes, so that some blocks are whole and threads take them one by one.
    adapters = [generators(model)[i % 5] for i in range(70)]
    running = Generations(model, adapters, [1 + i % 33 for i in range(70)])
    for step in range(3):
        running.grow(step)
        rows = running.rows()
        expected = model._run_pass(rows, running.cache, "last")
        given = model.run(rows, running.cache)
        assert given.stats == expected.stats
        assert given.routes == expected.routes
        for one, other in zip(given.logits, expected.logits, strict=True):
            assert one.dtype == other.dtype == dtype
            assert relative_error(one, other) < tolerance


@torch.no_grad()
def test_what_runs_beside_a_generation_changes_nothing(folder):
    model = packed(folder)
    adapters = generators(model)
    classifier = random_adapter(model.spec, seed=9, molex=molex_config())
    running = Generations(model, adapters, [5, 4, 3, 2, 1])
    running.grow(0)
    rows = running.rows()
    alone = [model.run([row], running.cache).logits[0] for row in rows]
    beside = [Row(random_ids(7, seed=3), classifier), Row(random_ids(20, seed=4), adapters[1])]
    together = model.run([beside[0], *rows[::-1], beside[1]], running.cache)
    assert len(together.logits) == 7
    assert (together.stats.tokens, together.stats.distinct_adapters) == (5 + 7 + 20, 6)
    for one, other in zip(alone, together.logits[1:-1][::-1], strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)
    for row, logits in zip(beside, (together.logits[0], together.logits[-1]), strict=True):
        torch.testing.assert_close(logits, model.run([row]).logits[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_generations_that_come_and_go_are_planned_anew(folder):
    model, reference = packed(folder), Reference(folder)
    adapters = generators(model)
    running = Generations(model, adapters, [2, 3, 4, 5, 6])
    for step, chosen in enumerate([[0, 1, 2], [2, 1], [2, 1], [4, 3, 0], [0, 3, 4]]):
        running.grow(step)
        rows = running.rows()
        output = model.run([rows[i] for i in chosen], running.cache)
        # Those that did not run have to, before their next token.
        model.run([rows[i] for i in range(5) if i not in chosen], running.cache)
        for place, i in enumerate(chosen):
            expected, _ = reference(running.texts[i], adapters[i], voters=len(running.texts[i]) - step - 1)
            torch.testing.assert_close(output.logits[place], expected[-1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_another_adapter_in_the_same_slot_is_planned_anew(folder):
    """Its factors lie elsewhere, and those of the first may be gone."""
    model = packed(folder)
    first, second = (random_adapter(model.spec, seed=n, task="CAUSAL_LM", r=2) for n in (1, 2))
    running = Generations(model, [first], [4])
    running.grow(0)
    model.run(running.rows(), running.cache)
    running.adapters[0] = second
    expected = model._run_pass(running.rows(), running.cache, "last").logits[0]
    torch.testing.assert_close(
        model.run(running.rows(), running.cache).logits[0], expected, atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_a_plan_holds_neither_adapters_nor_slots(folder):
    model = packed(folder)
    running = Generations(model, [random_adapter(model.spec, seed=1, task="CAUSAL_LM", r=2)], [4])
    running.grow(0)
    model.run(running.rows(), running.cache)
    assert isinstance(model._decoding, Decoding)
    held = [weakref.ref(running.adapters[0]), weakref.ref(running.slots[0])]
    running.cache.free(running.slots[0])
    del running
    gc.collect()
    assert [reference() for reference in held] == [None, None]


@torch.no_grad()
def test_a_token_that_is_not_finite_is_seen(folder):
    model = packed(folder)
    running = Generations(model, [BARE, BARE], [20, 5])
    running.grow(0)
    # A key of the second page, which is within every window.
    running.cache.depths[1].pages[running.slots[0].pages[0, 1], 0, 3] = float("nan")
    output = model.run(running.rows(), running.cache)
    assert not output.logits[0].isfinite().all()
    assert output.logits[1].isfinite().all()
