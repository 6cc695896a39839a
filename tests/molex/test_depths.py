"""Many depths in one call give what they give one by one, planned in Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertModel

from molex import MolexModel, Row
from molex.depths import TOKENS_PER_CALL, NativeDepths, PlannedDepths
from molex.errors import InputError
from molex.routing import flat_route
from tests.batches import mixed_rows, together_and_alone
from tests.molex.native.kernels import needs_kernels, threads
from tests.tiny import (
    DECODERS,
    ENCODERS,
    HIDDEN,
    LAYERS,
    POSITIONS,
    VOCAB,
    molex_config,
    random_adapter,
    random_ids,
)

pytestmark = needs_kernels

# Both ways run the same kernels on the same blocks of rows. Only queries and keys are rotated elsewhere.
ROTATION_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}
COSINE = {"kind": "cosine", "projection_dim": 4}


def native(folder, dtype, **weights):
    model = MolexModel.from_pretrained(folder, dtype)
    model.prepack(**weights)
    return model


def both_ways(model, rows, monkeypatch, lm_logits="last"):
    given = model.run(rows, lm_logits=lm_logits)
    with monkeypatch.context() as patch:
        patch.setattr(NativeDepths, "can_run", lambda forward: False)
        planned = model.run(rows, lm_logits=lm_logits)
    return given, planned


def assert_same(given, planned, tolerance):
    assert [flat_route(route) for route in given.routes] == [flat_route(route) for route in planned.routes]
    assert given.stats == planned.stats
    for one, other in zip(given.logits, planned.logits, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert (one.float() - other.float()).norm() <= tolerance * other.float().norm()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    "weights", [{}, {"bits": 8}, {"routed_bits": 8}, {"bits": 8, "routed_bits": 4}], ids=str
)
@pytest.mark.parametrize("family", ENCODERS)
@torch.inference_mode()
def test_encoders_give_the_same_numbers(family, weights, count, base_folder, monkeypatch):
    model = native(base_folder(family), torch.float32, **weights)
    for lengths in ([1], [7, 2, 9, 4, 11, 30], [9] * 120):
        with threads(count):
            assert_same(*both_ways(model, mixed_rows(model, lengths), monkeypatch), tolerance=0)


@pytest.mark.parametrize("lm_logits", ["last", "all"])
@pytest.mark.parametrize("dtype", ROTATION_TOLERANCE, ids=str)
@pytest.mark.parametrize("family", DECODERS)
@torch.inference_mode()
def test_decoders_agree_where_nothing_is_cached(family, dtype, lm_logits, base_folder, monkeypatch):
    model = native(base_folder(family), dtype)
    rows = mixed_rows(model, [3, 17, 1, 8, 40, 5, 2])
    # A vote on rounded hidden states may rightly end otherwise.
    for row, route in zip(rows, model.run(rows).routes, strict=True):
        row.route = route
    assert_same(*both_ways(model, rows, monkeypatch, lm_logits), ROTATION_TOLERANCE[dtype])


@pytest.fixture(scope="module")
def encoder(base_folder):
    return native(base_folder("bert"), torch.float32)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12))
@torch.inference_mode()
def test_batch_mates_change_nothing(encoder, lengths):
    for (route, logits), (own_route, own_logits) in together_and_alone(encoder, lengths):
        assert own_route == route
        torch.testing.assert_close(own_logits, logits)


@torch.inference_mode()
def test_where_it_stops_changes_nothing(encoder):
    rows = mixed_rows(encoder, [4, 20, 3, 3, 9, 1])
    whole, running = encoder.run(rows), encoder.begin(rows)
    for depths in (2, 1, LAYERS - 3):
        running.advance(depths)
    for one, other in zip(running.output().logits, whole.logits, strict=True):
        assert torch.equal(one, other)


@torch.inference_mode()
def test_short_passes_are_one_call_and_long_ones_one_a_depth(encoder):
    calls = []
    few, many = mixed_rows(encoder, [3, 3]), mixed_rows(encoder, [40] * (TOKENS_PER_CALL // 40 + 1))
    for rows in (few, many):
        encoder.run(rows, on_depths=lambda: calls.append(1))
        calls.append(0)
    assert calls == [1, 0, *[1] * LAYERS, 0]


@torch.inference_mode()
def test_cosine_gates_and_cached_rows_are_planned_in_python(encoder, base_folder):
    cosine = random_adapter(encoder.spec, seed=1, molex=molex_config(gate=COSINE))
    assert isinstance(encoder.begin([Row(random_ids(3, seed=1), cosine)])._depths, PlannedDepths)
    decoder = native(base_folder("llama"), torch.float32)
    cache = decoder.new_cache(4)
    slot = cache.allocate(8, 1, [])
    assert isinstance(decoder.begin([Row(random_ids(3, seed=1), slot=slot)], cache)._depths, PlannedDepths)
    assert isinstance(decoder.begin([Row(random_ids(3, seed=1))])._depths, NativeDepths)


@torch.inference_mode()
def test_numbers_that_are_not_finite_stay_in_their_request(encoder):
    rows = mixed_rows(encoder, [4, 6, 5])
    poisoned = random_adapter(encoder.spec, seed=7, molex=molex_config())
    poisoned.gates[0].weight.fill_(float("nan"))
    next(iter(poisoned.lora.updates.values())).b.fill_(float("nan"))
    expected = encoder.run(rows).logits
    *others, mine = encoder.run([*rows, Row(random_ids(5, seed=3), poisoned)]).logits
    assert mine.isnan().all()
    torch.testing.assert_close(others, expected)


@torch.inference_mode()
def test_an_adapter_of_another_base_is_refused_by_name(encoder, tmp_path):
    """The kernels read weights where they lie: those of a narrower base end early."""
    wider = MolexModel.from_pretrained(wider_base(tmp_path))
    rows = [Row(random_ids(5, seed=1))]
    for molex, fault in ((None, "the factors of .* in layer 0"), (molex_config(), "the gate of depth 0")):
        adapter = random_adapter(encoder.spec, seed=1, molex=molex)
        encoder.run([Row(random_ids(5, seed=1), adapter)])
        wider.prepack()
        with pytest.raises(InputError, match=f"{fault} do(es)? not fit the base model"):
            wider.run([*rows, Row(random_ids(5, seed=1), adapter)])


@torch.inference_mode()
def test_a_route_that_is_too_short_is_refused(encoder):
    row = mixed_rows(encoder, [5, 5, 5])[2]
    row.route = encoder.run([row]).routes[0][:-1]
    with pytest.raises(ValueError, match="shorter"):
        encoder.run([row])


def wider_base(folder):
    """A random BERT of twice the width."""
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=POSITIONS,
    )
    BertModel(config).save_pretrained(folder)
    return folder
