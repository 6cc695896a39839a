"""The vocabulary on the kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from molex import MolexModel
from molex.native.vocabulary import NativeEmbedding, NativeVocabulary
from tests.molex.native.kernels import needs_kernels, threads
from tests.tiny import DECODERS, tiny_base

pytestmark = needs_kernels

# Of the largest logit: bfloat16 keeps 8 bits of it, float32 sums in another order.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(deadline=None, max_examples=20)
@given(st.integers(0, 70), st.integers(1, 200), st.integers(1, 90), st.integers(1, 2), st.integers(0, 9))
def test_logits_and_embeddings_are_those_of_the_modules(dtype, rows, vocabulary, width, count, seed):
    torch.manual_seed(seed)
    head = nn.Linear(width, vocabulary, bias=False, dtype=dtype)
    hidden = torch.randn(rows, width, dtype=dtype)
    native = NativeVocabulary(head)
    with threads(count), torch.no_grad():
        expected, given = head.float()(hidden.float()), native(hidden)
    assert given.dtype == dtype
    limit = TOLERANCE[dtype] * max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)
    torch.testing.assert_close(given.float(), expected, atol=limit, rtol=0)
    tokens = torch.randint(vocabulary, (1, rows))
    embedded = NativeEmbedding(native)(tokens)
    assert torch.equal(embedded, head.weight.detach().to(dtype)[tokens])


@pytest.mark.parametrize("token", [-1, 65])
def test_a_token_outside_the_vocabulary_is_refused(token):
    embedding = NativeEmbedding(NativeVocabulary(nn.Linear(4, 65, bias=False)))
    with pytest.raises(RuntimeError, match=f"no token {token}"):
        embedding(torch.tensor([3, token]))


@pytest.mark.parametrize("kind", DECODERS)
def test_weights_that_are_tied_are_in_memory_once(kind, tmp_path):
    model = MolexModel.from_pretrained(tiny_base(kind, tmp_path))
    backbone = model.backbone
    before, tied = model.nbytes - backbone.layers.nbytes, backbone.config.tie_word_embeddings
    table = backbone.lm_head.weight.nbytes
    model.prepack()
    assert isinstance(backbone._base.get_input_embeddings(), NativeEmbedding) == tied
    # Tiles of 64 tokens are filled up, which takes less than the weights once more.
    assert model.nbytes - backbone.layers.nbytes < before + table / 2
