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
from molex.kv_cache import pages_for
from molex.routing import flat_route
from tests.batches import ROOM, generators, mixed_rows, relative_error, together_and_alone
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


def in_parts(model, adapters, parts, routes, lm_logits):
    """The outputs of passes that each run some more tokens of every prompt, and what they have cached.

    A classification rides along, which keeps nothing.
    """
    cache = model.new_cache(sum(pages_for(ROOM, adapter.num_streams) for adapter in adapters))
    slots = [cache.allocate(ROOM, adapter.num_streams) for adapter in adapters]
    texts = [random_ids(ROOM, seed=i) for i in range(len(adapters))]
    passing = Row(random_ids(5, seed=1), random_adapter(model.spec, seed=9, molex=molex_config([1])))
    done, outputs = [0] * len(adapters), []
    for part in parts:
        rows = [
            Row(text[start : start + count], adapter, slot=slot, start=start, route=route)
            for text, start, count, adapter, slot, route in zip(
                texts, done, part, adapters, slots, routes, strict=True
            )
        ]
        running = model.begin([*rows, passing], cache, lm_logits)
        running.advance(running.depths_left)
        outputs.append(running.output())
        routes = outputs[-1].routes[:-1]
        done = [start + count for start, count in zip(done, part, strict=True)]
    return outputs, torch.stack([depth.pages for depth in cache.depths])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("lm_logits", ["last", "all"])
@pytest.mark.parametrize("dtype", ROTATION_TOLERANCE, ids=str)
@pytest.mark.parametrize("family", DECODERS)
@torch.inference_mode()
def test_prompts_in_parts_agree(family, dtype, lm_logits, count, base_folder, monkeypatch):
    model = native(base_folder(family), dtype)
    adapters = generators(model)
    # Parts that end in a page, at its end and behind it, more keys than a tile has, and single tokens.
    parts = [[16, 3, 65, 1, 20], [1, 40, 4, 15, 12], [50, 1, 1, 33, 37]]
    pinned = in_parts(model, adapters, parts, [None] * len(adapters), lm_logits)[0][0].routes[:-1]
    with threads(count):
        given, given_cache = in_parts(model, adapters, parts, pinned, lm_logits)
    with monkeypatch.context() as patch:
        patch.setattr(NativeDepths, "can_run", lambda forward: False)
        planned, planned_cache = in_parts(model, adapters, parts, pinned, lm_logits)
    for one, other in zip(given, planned, strict=True):
        assert_same(one, other, ROTATION_TOLERANCE[dtype])
    assert relative_error(given_cache, planned_cache) <= ROTATION_TOLERANCE[dtype]
    assert torch.equal((given_cache != 0).any(-1), (planned_cache != 0).any(-1))


@torch.inference_mode()
def test_later_tokens_change_nothing_that_was_cached(base_folder):
    """What is behind a request's tokens in its pages may hold anything."""
    model = native(base_folder("llama"), torch.float32)
    cache = model.new_cache(2)
    slot, ids = cache.allocate(32), random_ids(20, seed=1)
    model.run([Row(ids[:15], slot=slot)], cache)
    (expected,) = model.run([Row(ids[15:], slot=slot, start=15)], cache).logits
    for depth in cache.depths:
        depth.pages[slot.pages[0, 1], :, 4:] = torch.nan
    (logits,) = model.run([Row(ids[15:], slot=slot, start=15)], cache).logits
    assert torch.equal(logits, expected)


@torch.inference_mode()
def test_a_page_that_is_not_in_the_cache_is_refused(base_folder):
    model = native(base_folder("llama"), torch.float32)
    cache = model.new_cache(2)
    slot = cache.allocate(32)
    for page in (2, -1):
        slot.pages[0, 1] = page
        with pytest.raises(RuntimeError, match="request 0 has a page that is not in the cache"):
            model.run([Row(random_ids(20, seed=1), slot=slot)], cache)


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
def test_cosine_gates_are_planned_in_python(encoder, base_folder):
    cosine = random_adapter(encoder.spec, seed=1, molex=molex_config(gate=COSINE))
    assert isinstance(encoder.begin([Row(random_ids(3, seed=1), cosine)])._depths, PlannedDepths)
    decoder = native(base_folder("llama"), torch.float32)
    cache = decoder.new_cache(4)
    for slot in (None, cache.allocate(8)):
        running = decoder.begin([Row(random_ids(3, seed=1), slot=slot)], cache)
        assert isinstance(running._depths, NativeDepths)


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
