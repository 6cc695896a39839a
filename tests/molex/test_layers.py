"""Layers in a precision of their own for the routed branch."""

from __future__ import annotations

import pytest
import torch

from molex import MolexModel, Row
from tests.tiny import DECODERS, ENCODERS, molex_config, random_adapter, random_ids

PREPACKED = [False, True]
# Of logits near 1. The tiny adapters give the routed branch four tenths of the weight, eight times what
# trained ones do: seen are 0.017 and 5e-7, where all layers in that precision would give 0.06 and 2.5e-6.
TOLERANCE = {torch.bfloat16: 0.05, torch.float32: 2e-6}


def models(folder, routed_dtype, prepack):
    own_dtype = torch.float64 if routed_dtype == torch.float32 else torch.float32
    pair = [
        MolexModel.from_pretrained(folder, dtype=own_dtype, routed_dtype=routed)
        for routed in (None, routed_dtype)
    ]
    if prepack:
        for model in pair:
            model.prepack()
    return pair


def rows(adapter, routes):
    lengths = (7, 1, 12, 3)
    return [
        Row(random_ids(n, seed=n), adapter, route=route) for n, route in zip(lengths, routes, strict=True)
    ]


@pytest.mark.parametrize("prepack", PREPACKED)
@pytest.mark.parametrize("routed_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ENCODERS + DECODERS)
@torch.inference_mode()
def test_only_the_routed_branch_is_rounded(family, routed_dtype, prepack, base_folder):
    exact, reduced = models(base_folder(family), routed_dtype, prepack)
    adapter = random_adapter(exact.spec, seed=1, molex=molex_config())
    # Pinned: a vote on rounded hidden states may rightly end otherwise.
    routes = exact.run(rows(adapter, [None] * 4)).routes
    expected, outputs = (model.run(rows(adapter, routes)).logits for model in (exact, reduced))
    assert any(not torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    tolerance = TOLERANCE[routed_dtype]
    for output, other in zip(outputs, expected, strict=True):
        assert output.dtype == other.dtype
        torch.testing.assert_close(output, other, atol=tolerance, rtol=tolerance)


def test_a_second_copy_of_the_layers_counts_as_memory(base_folder):
    exact, reduced = models(base_folder("gpt2"), torch.bfloat16, prepack=False)
    in_layers = sum(p.nbytes for block in exact.backbone.layers.blocks for p in block.parameters())
    assert 0 < in_layers < exact.nbytes
    assert reduced.nbytes == exact.nbytes + in_layers // 2


@torch.inference_mode()
def test_without_routes_nothing_is_rounded(base_folder):
    exact, reduced = models(base_folder("roberta"), torch.bfloat16, prepack=True)
    lora = random_adapter(exact.spec, seed=1)
    output, expected = (model.run(rows(lora, [None] * 4)).logits for model in (reduced, exact))
    torch.testing.assert_close(output, expected, atol=0, rtol=0)


@torch.inference_mode()
def test_decoding_keeps_the_streams_of_both_precisions(base_folder):
    model = MolexModel.from_pretrained(base_folder("llama"), routed_dtype=torch.bfloat16)
    adapter = random_adapter(model.spec, seed=1, molex=molex_config(), task="CAUSAL_LM")
    tokens = random_ids(9, seed=2)
    whole = model.run([Row(tokens, adapter, voters=5)], lm_logits="all")
    cache = model.new_cache(2)
    slot, route = cache.allocate(9, adapter.num_streams), whole.routes[0]
    logits = [model.run([Row(tokens[:5], adapter, slot=slot, route=route)], cache).logits[0]]
    for at in range(5, 9):
        step = Row(tokens[at : at + 1], adapter, slot=slot, start=at, route=route)
        logits.append(model.run([step], cache).logits[0])
    # Attention in bfloat16 rounds differently for one query and for nine.
    tolerance = TOLERANCE[torch.bfloat16]
    torch.testing.assert_close(torch.stack(logits), whole.logits[0][4:], atol=tolerance, rtol=tolerance)
