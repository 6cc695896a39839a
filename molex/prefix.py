"""Which tokens of a request have the keys and values that another request's had."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import sha256

from molex.adapter import BARE, Adapter
from molex.kv_cache import PAGE_TOKENS


def page_keys(
    adapter: Adapter, prompt: Sequence[int], tokens: Sequence[int], *, owner: str = ""
) -> list[bytes]:
    """A key for each full page of `tokens`, which a request with this prompt has run.

    Under equal keys all streams hold the same, as they do for all pages before: keys and values depend on the
    adapter, on every token so far and on the route. Without routed layers any common beginning will do. With
    them only the same prompt is sure to have the same route, so all of it is in the key. Requests of
    different owners have no keys in common: the time of an answer is to tell nobody what another has asked.
    """
    if adapter is not BARE and not adapter.digest:
        return []  # Nothing tells such adapters apart.
    voters = () if adapter.molex is None else prompt
    key = _digest(f"{owner}/{adapter.digest}/".encode(), voters)
    keys: list[bytes] = []
    for end in range(PAGE_TOKENS, len(tokens) + 1, PAGE_TOKENS):
        key = _digest(key, tokens[end - PAGE_TOKENS : end])
        keys.append(key)
    return keys


def _digest(before: bytes, tokens: Sequence[int]) -> bytes:
    return sha256(before + array("q", tokens).tobytes()).digest()
