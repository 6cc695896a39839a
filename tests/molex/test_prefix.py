"""Keys of pages: equal exactly where keys and values are."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molex import BARE, MolexModel
from molex.kv_cache import PAGE_TOKENS
from molex.prefix import page_keys
from tests.tiny import molex_config, random_adapter, tiny_base

texts = st.lists(st.integers(0, 1), max_size=5 * PAGE_TOKENS)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    spec = MolexModel.from_pretrained(tiny_base("llama", tmp_path_factory.mktemp("llama"))).spec
    return {
        "bare": BARE,
        "lora": random_adapter(spec, seed=1, task="CAUSAL_LM"),
        "molex": random_adapter(spec, seed=2, task="CAUSAL_LM", molex=molex_config()),
    }


def shared(one, other):
    return sum(1 for a, b in zip(one, other, strict=False) if a == b)


@pytest.mark.parametrize("kind", ["bare", "lora"])
@given(texts, texts, texts)
def test_without_routes_any_common_beginning_is_shared(adapters, kind, common, one, other):
    keys = [page_keys(adapters[kind], text, text) for text in (common + one, common + other)]
    assert [len(ours) for ours in keys] == [len(common + end) // PAGE_TOKENS for end in (one, other)]
    agree = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    least = min(len(one), len(other)) if agree is None else agree
    assert shared(*keys) == (len(common) + least) // PAGE_TOKENS


def test_with_routes_only_the_same_prompt_is_shared(adapters):
    prompt = list(range(40))
    keys = page_keys(adapters["molex"], prompt, prompt)
    assert page_keys(adapters["molex"], prompt, prompt[:-1]) == keys
    assert page_keys(adapters["molex"], prompt, [*prompt, *range(8)])[:2] == keys
    assert shared(keys, page_keys(adapters["molex"], [*prompt, 1], [*prompt, 1])) == 0


def test_adapters_share_nothing(adapters):
    prompt = list(range(20))
    keys = {page_keys(adapter, prompt, prompt)[0] for adapter in adapters.values()}
    assert len(keys) == 3


def test_an_adapter_without_a_digest_shares_nothing(adapters):
    assert page_keys(replace(adapters["lora"], digest=""), range(40), range(40)) == []


@pytest.mark.parametrize("kind", ["bare", "lora", "molex"])
def test_owners_share_nothing(adapters, kind):
    prompt = range(2 * PAGE_TOKENS)
    keys = [page_keys(adapters[kind], prompt, prompt, owner=owner) for owner in ("", "acme", "other")]
    assert len({key for of_owner in keys for key in of_owner}) == 6
    assert page_keys(adapters[kind], prompt, prompt, owner="acme") == keys[1]
