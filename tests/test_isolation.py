"""An answer depends on its own request and adapter, never on the batch that it runs in."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molex import BARE, MolexModel, Row
from molex.reference import Reference
from tests.tiny import DECODERS, ENCODERS, LAYERS, molex_config, random_adapter, random_ids, tiny_base

# One rounding of float32 is 6e-8; five layers of sums over 32 to 64 terms stay far below this.
FLOAT32_TOLERANCE = 1e-4
# Each bfloat16 rounding is 4e-3 relative; errors of ten roundings a layer add up over five layers. Values
# here are of size 1 to 5.
BFLOAT16_TOLERANCE = 0.35
# The RMS norms and rotations of transformers' Llama kin compute in float32 whatever the model's dtype.
FLOAT64_TOLERANCE = {"bert": 1e-9, "roberta": 1e-9, "gpt2": 1e-9}


@pytest.fixture(scope="module", params=ENCODERS + DECODERS)
def base(request, tmp_path_factory):
    return tiny_base(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def model(base):
    return MolexModel.from_pretrained(base)


@pytest.fixture(scope="module")
def reference(base):
    return Reference(base)


def tasks(model):
    return ("SEQ_CLS", "CAUSAL_LM") if model.spec.generates else ("SEQ_CLS",)


def all_kinds(model, dtype=torch.float32):
    """Adapters that differ in everything that a batch can mix."""
    mixtures = [
        None,
        molex_config(),
        molex_config([0, 2], gate={"scope": "depth"}, vote={"rule": "mean"}),
        molex_config([1, 3, 4], gate={"kind": "cosine", "projection_dim": 8}, top_k=2),
        molex_config(
            [0, 1, 4],
            gate={"kind": "cosine", "projection_dim": 8, "normalize": "sequence"},
            vote={"rule": "mean", "score": "sigmoid"},
        ),
        molex_config(range(LAYERS), vote={"rule": "mean"}, top_k=2),
    ]
    return [BARE] + [
        random_adapter(
            model.spec, seed=n, dtype=dtype, task=task, r=1 + 3 * (n % 3), molex=molex, num_labels=2 + n
        )
        for n, (molex, task) in enumerate((m, t) for m in mixtures for t in tasks(model))
    ]


def run(model, rows, **options):
    with torch.no_grad():
        return model.run(rows, lm_logits="all", **options)


def assert_same(one, other, tolerance=FLOAT32_TOLERANCE):
    torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def same_choices(one, other):
    """Equal layers; their weights, which are computed, may differ by rounding."""
    assert [c.layers for c in one] == [c.layers for c in other]
    for a, b in zip(one, other, strict=True):
        assert a.weights == pytest.approx(b.weights, abs=1e-4)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_mixed_batch_equals_each_row_alone(model, seed):
    rng = random.Random(seed)
    adapters = all_kinds(model)
    rows = []
    for n in range(rng.randint(1, 14)):
        ids = random_ids(rng.choice([1, 2, 3, 7, 8, 19, 40]), seed + n)
        rows.append(Row(ids, rng.choice(adapters), voters=rng.choice([None, rng.randint(1, len(ids))])))

    together = run(model, rows)

    for row, logits, route in zip(rows, together.logits, together.routes, strict=True):
        alone = run(model, [row])
        same_choices(route, alone.routes[0])
        assert_same(logits, alone.logits[0])


def test_packed_forward_equals_the_reference(model, reference):
    rows = []
    for n, adapter in enumerate(all_kinds(model)):
        ids = random_ids(3 + 2 * n, seed=n)
        rows += [Row(ids, adapter), Row(ids[::-1], adapter, voters=2)]

    output = run(model, rows)

    for row, logits, route in zip(rows, output.logits, output.routes, strict=True):
        expected, expected_route = reference(row.token_ids, row.adapter, row.voters)
        same_choices(route, expected_route)
        assert_same(logits, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_equal_the_reference_in_float64(base, dtype):
    model, reference = MolexModel.from_pretrained(base, dtype=dtype), Reference(base, torch.float64)
    exact_tolerance = FLOAT64_TOLERANCE.get(model.spec.model_type, 1e-5)
    tolerance = exact_tolerance if dtype == torch.float64 else BFLOAT16_TOLERANCE
    kinds = zip(all_kinds(model, dtype), all_kinds(model, torch.float64), strict=True)
    for n, (adapter, exact) in enumerate(kinds):
        ids = random_ids(9, seed=n)
        _, route = reference(ids, exact)
        # The route is pinned: a vote on rounded hidden states may rightly end otherwise.
        output = run(model, [Row(ids, adapter, route=route)])
        expected, _ = reference(ids, exact, route=route)
        torch.testing.assert_close(output.logits[0].double(), expected, atol=tolerance, rtol=tolerance)


def test_longest_request_and_an_empty_batch(model):
    adapter = random_adapter(model.spec, seed=1, molex=molex_config())
    longest = Row(random_ids(model.spec.max_length, seed=2), adapter)
    assert_same(run(model, [longest, Row([5], adapter)]).logits[0], run(model, [longest]).logits[0])
    assert run(model, []).logits == []
