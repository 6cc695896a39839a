"""The published way of running MoLEx, as the benchmarks have it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.published import PublishedModel
from molex.reference import Reference
from tests.tiny import LAYERS, VOCAB, molex_config, random_adapter, random_ids

TOKENS = st.lists(st.integers(4, VOCAB - 1), min_size=1, max_size=24)
GATES = {
    "linear": {},
    "cosine": {"gate": {"kind": "cosine", "projection_dim": 8, "normalize": "sequence"}},
    "some depths": {"depths": (0, 3), "gate": {"scope": "depth"}},
}


@pytest.fixture(scope="module", params=["roberta", "bert"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def published(family, base_folder):
    return PublishedModel(base_folder(family))


@pytest.fixture(scope="module")
def reference(family, base_folder):
    return Reference(base_folder(family))


@pytest.mark.parametrize("gate", GATES)
@given(tokens=TOKENS)
def test_one_request_without_padding_gets_the_logits_of_the_reference(
    gate, tokens, family, spec_of, published, reference
):
    adapter = random_adapter(spec_of(family), seed=1, molex=molex_config(**GATES[gate]))
    published.use(adapter)
    torch.testing.assert_close(
        published(published.pad([tokens]))[0], reference(tokens, adapter)[0], rtol=1e-3, atol=1e-4
    )


def test_padding_is_masked(family, spec_of, published, reference):
    adapter = random_adapter(spec_of(family), seed=2)
    inputs = [random_ids(length, seed=length) for length in (3, 17, 8)]
    published.use(adapter)
    expected = torch.stack([reference(tokens, adapter)[0] for tokens in inputs])
    torch.testing.assert_close(published(published.pad(inputs)), expected, rtol=1e-3, atol=1e-4)


def test_the_whole_batch_votes(family, spec_of, published):
    """Alone, short texts choose other layers than beside longer ones somewhere: their logits change."""
    adapter = random_adapter(spec_of(family), seed=3, molex=molex_config())
    inputs = [random_ids(length, seed=length) for length in (3, 4, 5, 24)]
    published.use(adapter)
    alone = torch.cat([published(published.pad([tokens])) for tokens in inputs])
    assert not torch.allclose(published(published.pad(inputs)), alone, rtol=1e-3, atol=1e-4)


def test_adapters_take_turns(family, spec_of, published, reference):
    tokens = random_ids(9, seed=0)
    for seed, depths in ((4, range(LAYERS)), (5, (1,)), (4, range(LAYERS))):
        adapter = random_adapter(spec_of(family), seed=seed, molex=molex_config(depths))
        published.use(adapter)
        torch.testing.assert_close(
            published(published.pad([tokens]))[0], reference(tokens, adapter)[0], rtol=1e-3, atol=1e-4
        )
