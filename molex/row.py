"""One request's part of a packed batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from molex.adapter import BARE, Adapter
from molex.backbone import BaseSpec
from molex.errors import InputError
from molex.kv_cache import KVCache, Slot
from molex.routing import Route


@dataclass
class Row:
    """One request's part of a packed batch.

    `token_ids` are the tokens to run now. The first `voters` of them decide the route (None: all of them),
    unless `route` pins it. A generation has a cache `slot`, in which `start` earlier tokens are kept.
    """

    token_ids: Sequence[int]
    adapter: Adapter = BARE
    voters: int | None = None
    token_type_ids: Sequence[int] | None = None
    slot: Slot | None = None
    start: int = 0
    route: Route | None = None


def check(number: int, row: Row, spec: BaseSpec, cache: KVCache | None) -> None:
    """Refuse what would make the embedding or the cache fail for the whole batch.

    Raises InputError that names the request by its number and says what is wrong with it.
    """
    length, limit = row.start + len(row.token_ids), spec.max_length
    if not len(row.token_ids):
        raise InputError(f"request {number}: no tokens")
    if length > limit:
        raise InputError(f"request {number}: {length} tokens, but the base model takes at most {limit}")
    if not 0 <= min(row.token_ids) <= max(row.token_ids) < spec.vocab_size:
        raise InputError(f"request {number}: a token id is not in 0..{spec.vocab_size - 1}")
    if row.voters is not None and not 1 <= row.voters <= len(row.token_ids):
        raise InputError(f"request {number}: {row.voters} of {len(row.token_ids)} tokens cannot vote")
    if row.start and row.slot is None:
        raise InputError(f"request {number}: {row.start} earlier tokens, but no cache slot that holds them")
    if row.start and row.adapter.gates and row.route is None:
        raise InputError(f"request {number}: the route of its {row.start} earlier tokens is not pinned")
    if row.slot is not None and (cache is None or length > row.slot.max_length):
        raise InputError(f"request {number}: {length} tokens do not fit its cache slot")
    if row.slot is not None and row.slot.num_streams < row.adapter.num_streams:
        raise InputError(f"request {number}: its cache slot has no room for routed layers")
    if row.token_type_ids is not None:
        _check_types(number, row.token_type_ids, len(row.token_ids), spec)


def _check_types(number: int, types: Sequence[int], length: int, spec: BaseSpec) -> None:
    if not spec.token_types:
        raise InputError(f"request {number}: {spec.model_type} has no token types")
    if len(types) != length:
        raise InputError(f"request {number}: {len(types)} token types for {length} tokens")
    if not 0 <= min(types) <= max(types) < spec.token_types:
        raise InputError(f"request {number}: a token type is not in 0..{spec.token_types - 1}")
