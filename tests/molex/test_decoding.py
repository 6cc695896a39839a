"""Token by token with a cache equals the full forward with the pinned routes."""

from __future__ import annotations

import pytest
import torch

from molex import BARE, MolexModel, Row
from molex.errors import InputError
from molex.kv_cache import pages_for
from molex.prefix import page_keys
from molex.reference import Reference
from tests.tiny import DECODERS, molex_config, random_adapter, random_ids, tiny_base

TOLERANCE = 1e-4  # float32, as in tests/test_isolation.py


@pytest.fixture(scope="module", params=DECODERS)
def base(request, tmp_path_factory):
    return tiny_base(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(params=["PyTorch", "prepacked"])
def model(request, base):
    model = MolexModel.from_pretrained(base)
    if request.param == "prepacked":
        model.prepack()
    return model


def adapters(model):
    mixtures = [None, molex_config(), molex_config([0, 3], vote={"rule": "mean"}, top_k=2)]
    kinds = [
        random_adapter(model.spec, seed=n, task="CAUSAL_LM", r=2 + n, molex=molex)
        for n, molex in enumerate(mixtures)
    ]
    return [BARE, *kinds, random_adapter(model.spec, seed=9, molex=molex_config())]


@torch.no_grad()
def test_decoding_equals_the_full_forward(model, base):
    reference = Reference(base)
    *generating, classifier = adapters(model)
    cache = model.new_cache(sum(pages_for(40, adapter.num_streams) for adapter in generating))
    texts = [random_ids(30, seed=n) for n in range(len(generating))]
    prompts = [3, 11, 1, 7]
    slots = [cache.allocate(40, adapter.num_streams) for adapter in generating]
    assert cache.num_free == 0
    # Prompts enter one after the other while those before them decode; a classification rides along.
    done: list[int] = []
    routes: dict[int, object] = {}
    for entering in range(len(generating) + 9):
        rows = [
            Row([texts[i][n]], generating[i], slot=slots[i], start=n, route=routes[i])
            for i, n in enumerate(done)
        ]
        if entering < len(generating):
            i = entering
            rows.append(Row(texts[i][: prompts[i]], generating[i], slot=slots[i]))
            done.append(prompts[i] - 1)
        output = model.run([*rows, Row(random_ids(5, seed=1), classifier)], cache)
        for i in range(len(done)):
            routes[i] = output.routes[i]
            done[i] += 1
            expected, route = reference(texts[i][: done[i]], generating[i], voters=prompts[i])
            assert [c.layers for c in route] == [c.layers for c in output.routes[i]]
            torch.testing.assert_close(output.logits[i], expected[-1], atol=TOLERANCE, rtol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("length", [33, 37, 48])
def test_a_prompt_after_kept_pages_equals_the_full_forward(model, length):
    *generating, _ = adapters(model)
    cache = model.new_cache(40)
    prompt = random_ids(length, seed=5)
    for adapter in generating:
        slot = cache.allocate(60, adapter.num_streams)
        first = model.run([Row(prompt, adapter, slot=slot)], cache)
        cache.keep(slot, page_keys(adapter, prompt, prompt), first.routes[0])
        cache.free(slot)
    rows = []
    for adapter in generating:
        slot = cache.allocate(60, adapter.num_streams, page_keys(adapter, prompt, prompt[:-1]))
        assert slot.num_reused == 32
        rows.append(Row(prompt[32:], adapter, slot=slot, start=32, route=slot.route))
    output = model.run(rows, cache)
    for adapter, logits, route in zip(generating, output.logits, output.routes, strict=True):
        whole = model.run([Row(prompt, adapter)])
        assert route == whole.routes[0]
        torch.testing.assert_close(logits, whole.logits[0], atol=TOLERANCE, rtol=TOLERANCE)


@torch.no_grad()
def test_a_reused_slot_forgets_its_former_request(model):
    adapter = adapters(model)[2]
    cache = model.new_cache(pages_for(40, adapter.num_streams))
    ids = random_ids(6, seed=3)
    for former in (None, random_ids(30, seed=4)):
        slot = cache.allocate(40, 2)
        if former:
            model.run([Row(former, adapter, slot=slot)], cache)
            cache.free(slot)
            slot = cache.allocate(40, 2)
        first = model.run([Row(ids[:-1], adapter, slot=slot)], cache)
        second = model.run([Row(ids[-1:], adapter, slot=slot, start=5, route=first.routes[0])], cache)
        cache.free(slot)
        whole = model.run([Row(ids, adapter, voters=5)])
        torch.testing.assert_close(second.logits[0], whole.logits[0], atol=TOLERANCE, rtol=TOLERANCE)


def test_a_continuation_without_its_slot_or_route_is_named(base):
    model = MolexModel.from_pretrained(base)
    cache, adapter = model.new_cache(4), adapters(model)[2]
    with pytest.raises(InputError, match="request 0: 3 earlier tokens, but no cache slot"):
        model.run([Row([5], start=3)], cache)
    with pytest.raises(InputError, match="request 0: the route of its 3 earlier tokens is not pinned"):
        model.run([Row([5], adapter, slot=cache.allocate(8, 2), start=3)], cache)
    with pytest.raises(InputError, match="request 0: 17 tokens do not fit its cache slot"):
        model.run([Row(random_ids(17, seed=1), slot=cache.allocate(16))], cache)
    with pytest.raises(InputError, match="request 0: its cache slot has no room for routed layers"):
        model.run([Row([5], adapter, slot=cache.allocate(16))], cache)
