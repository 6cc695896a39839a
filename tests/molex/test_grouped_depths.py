"""Depths whose layers the device alone knows give what the reference gives, without waiting for it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molex import BARE, MolexModel, Row
from molex.backbone import Backbone
from molex.grouped.layers import GroupedLayers
from molex.grouped_depths import GroupedDepths
from molex.reference import Reference
from molex.routing import flat_route, sole_choice
from tests.batches import Generations, mixed_rows, relative_error, together_and_alone
from tests.molex.grouped.grouping import NoWaiting, Operations, grouped, moved
from tests.tiny import DECODERS, ENCODERS, LAYERS, molex_config, random_adapter, random_ids

LENGTHS = [3, 17, 1, 8, 40, 5, 2]
# Of all logits together, against the same layers planned on the host, which mix in another order; in bfloat16
# against PyTorch's modules, whose low-rank factors are in float32.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.06}


@pytest.mark.parametrize("family", ENCODERS + DECODERS)
@torch.inference_mode()
def test_answers_are_those_of_the_reference(family, base_folder, monkeypatch):
    model, reference = grouped(base_folder(family), monkeypatch), Reference(base_folder(family))
    rows = mixed_rows(model, LENGTHS)
    output = model.run(rows)
    for row, logits, route in zip(rows, output.logits, output.routes, strict=True):
        expected, expected_route = reference(list(row.token_ids), row.adapter, voters=row.voters)
        assert [c.layers for c in route] == [c.layers for c in expected_route]
        expected = expected[-1] if model.spec.generates else expected
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", ENCODERS + DECODERS)
@torch.inference_mode()
def test_a_plan_of_the_host_gives_the_same(family, dtype, base_folder, monkeypatch):
    model = grouped(base_folder(family), monkeypatch, dtype)
    stock = MolexModel.from_pretrained(base_folder(family), dtype)
    rows = mixed_rows(model, LENGTHS)
    # Pinned: a vote on rounded hidden states may rightly end otherwise.
    for row, route in zip(rows, model.run(rows).routes, strict=True):
        row.route = route
    given = model.run(rows, lm_logits="all")
    with monkeypatch.context() as patch:
        patch.setattr(GroupedDepths, "can_run", lambda forward: False)
        planned = model.run(rows, lm_logits="all")
        # Where layers look back differently far, each has attention of its own.
        patch.setattr(Backbone, "layers_share_attention", False)
        apart = model.run(rows, lm_logits="all")
    modules = stock.run(rows, lm_logits="all")
    for other in (planned, apart, modules):
        assert (given.routes, given.stats) == (other.routes, other.stats)
        for one, expected in zip(given.logits, other.logits, strict=True):
            assert one.dtype == expected.dtype
            assert relative_error(one, expected) < TOLERANCE[dtype]


@pytest.fixture(scope="module")
def encoder(base_folder):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return grouped(base_folder("bert"), monkeypatch)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12))
@torch.inference_mode()
def test_batch_mates_change_nothing(encoder, lengths):
    for (route, logits), (own_route, own_logits) in together_and_alone(encoder, lengths):
        assert flat_route(own_route) == flat_route(route)
        torch.testing.assert_close(own_logits, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ENCODERS + DECODERS)
@torch.no_grad()
def test_no_depth_waits_for_the_device(family, base_folder, monkeypatch):
    """On the meta device PyTorch also checks what its grouped products want on a GPU."""
    model = grouped(base_folder(family), monkeypatch, torch.bfloat16, "meta")
    rows = [Row(row.token_ids, moved(row.adapter, model)) for row in mixed_rows(model, LENGTHS)]
    with NoWaiting():
        running = model.begin(rows)
        running.advance(running.depths_left)


@torch.no_grad()
def test_a_depth_that_waits_is_found_out(base_folder, monkeypatch):
    model = grouped(base_folder("bert"), monkeypatch, torch.bfloat16, "meta")
    adapter = moved(random_adapter(model.spec, seed=1, molex=molex_config()), model)
    monkeypatch.setattr(GroupedDepths, "can_run", lambda forward: False)
    with NoWaiting():
        running = model.begin([Row(random_ids(5, seed=1), adapter)])
        with pytest.raises((RuntimeError, AssertionError), match=r"meta tensor|waits for the device"):
            running.advance(running.depths_left)


def operations(model, rows, cache=None):
    """What a GPU is asked to do for a pass, once all is set up."""
    for _ in range(2):
        with Operations() as counted:
            model.begin(rows).advance(LAYERS) if cache is None else model.run(rows, cache)
    return counted.count


@pytest.mark.parametrize(("family", "most"), [("bert", 3.3), ("llama", 1.25)])
@torch.no_grad()
def test_mixing_costs_few_operations(family, most, base_folder, monkeypatch):
    """Over LoRA: three times as many with votes, a sixth more for a step whose routes are pinned."""
    model = grouped(base_folder(family), monkeypatch, torch.bfloat16, "meta")
    counts = []
    for mixture, choices in ((None, ()), (molex_config(), (sole_choice(1),) * LAYERS)):
        task = "CAUSAL_LM" if model.spec.generates else "SEQ_CLS"
        adapter = moved(random_adapter(model.spec, seed=1, molex=mixture, task=task), model)
        if model.spec.generates:
            running = Generations(model, [adapter], [9], [choices])
            running.grow(0)
            counts.append(operations(model, running.rows(), running.cache))
        else:
            counts.append(operations(model, [Row(random_ids(9, seed=1), adapter)]))
    assert counts[0] < counts[1] < most * counts[0], counts


@torch.no_grad()
def test_pytorchs_modules_stay_on_the_device_too(base_folder, monkeypatch):
    """Where nobody votes, layers in another precision than bfloat16 do not wait either."""
    monkeypatch.setattr("molex.backbone._digest", lambda model: "sha256:none")
    model = MolexModel.from_pretrained(base_folder("roberta"), torch.float32, "meta")
    adapters = [BARE, moved(random_adapter(model.spec, seed=1), model)]
    with NoWaiting():
        running = model.begin([Row(random_ids(n, seed=n), adapters[n % 2]) for n in (3, 8, 5)])
        running.advance(running.depths_left)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_cpu_and_other_precisions_keep_pytorchs_modules(dtype, base_folder, monkeypatch):
    model = MolexModel.from_pretrained(base_folder("gpt2"), dtype)
    monkeypatch.setattr("molex.native.build.why_not", lambda dtype, device: "are not used here")
    model.prepack()
    assert not isinstance(model.backbone.layers, GroupedLayers)


def test_stacked_weights_count_as_memory_once(base_folder, monkeypatch):
    stock = MolexModel.from_pretrained(base_folder("llama"))
    model = grouped(base_folder("llama"), monkeypatch)
    assert model.nbytes == stock.nbytes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ENCODERS + DECODERS)
@torch.inference_mode()
def test_a_gpu_gives_the_answers_of_the_cpu(family, base_folder, monkeypatch):
    folder = base_folder(family)
    expected, model = (
        MolexModel.from_pretrained(folder, torch.bfloat16, device) for device in ("cpu", "cuda")
    )
    model.prepack()
    assert isinstance(model.backbone.layers, GroupedLayers)
    rows = mixed_rows(expected, LENGTHS)
    for row, route in zip(rows, expected.run(rows).routes, strict=True):
        row.route = route
    on_gpu = [Row(row.token_ids, moved(row.adapter, model), route=row.route) for row in rows]
    for one, other in zip(model.run(on_gpu).logits, expected.run(rows).logits, strict=True):
        assert relative_error(one.cpu(), other) < TOLERANCE[torch.bfloat16]
