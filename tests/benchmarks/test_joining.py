"""Passes that advance together give every request the answer that it has alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.joining import Cohort, Joined
from molex import MolexModel, Row
from tests.tiny import LAYERS, molex_config, random_adapter, random_ids

REQUEST = st.tuples(st.integers(1, 20), st.integers(0, 3))
"""Tokens, and number of the adapter."""
COHORT = st.tuples(st.integers(0, LAYERS), st.lists(REQUEST, min_size=1, max_size=4))
"""After how many depths of the cohort before it comes, and its requests."""


@pytest.fixture(scope="module", params=["roberta", "bert"])
def model(request, base_folder):
    return MolexModel.from_pretrained(base_folder(request.param))


@pytest.fixture(scope="module")
def adapters(model):
    mixtures = [molex_config(), molex_config(top_k=2), molex_config(depths=(0, 3)), None]
    return [random_adapter(model.spec, seed=n, molex=molex) for n, molex in enumerate(mixtures)]


@settings(max_examples=25)
@given(cohorts=st.lists(COHORT, min_size=1, max_size=4))
@torch.no_grad()
def test_answers_are_those_of_plain_batches(cohorts, model, adapters):
    batches = [
        [Row(random_ids(length, seed=n), adapters[number]) for n, (length, number) in enumerate(requests)]
        for _, requests in cohorts
    ]
    joined, begun, under_way = Joined(model, adapters), [], []
    for (wait, _), rows in zip(cohorts, batches, strict=True):
        for _ in range(wait):
            if under_way:
                joined.advance(under_way)
            under_way = [cohort for cohort in under_way if not cohort.ended]
        begun.append(Cohort(model, rows))
        under_way.append(begun[-1])
    while under_way:
        joined.advance(under_way)
        under_way = [cohort for cohort in under_way if not cohort.ended]
    for cohort, rows in zip(begun, batches, strict=True):
        torch.testing.assert_close(cohort.logits(), model.run(rows).logits, rtol=1e-4, atol=1e-5)
