"""Steps of running generations: all depths as one piece of work of fixed shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from molex.attention import AttentionOptions, rotated, scaled_attention
from molex.grouped.layers import Factors, GroupedLayers
from molex.grouped.replay import Replay
from molex.grouped.rows import LayerRows
from molex.kv_cache import PAGE_TOKENS, DepthCache
from molex.packing import Indices
from molex.plan import RoutePlan
from molex.stage import Stage


class Places:
    """Where s rows of a depth come from, and where their keys and values are kept.

    The same at all depths that the same requests visit. `tokens` [s] are the generations that the rows are
    of, `pages` [s, p] those of their streams.
    """

    def __init__(self, tokens: Tensor, pages: Indices, num_kv_heads: int) -> None:
        self.tokens = tokens
        self._pages = torch.from_numpy(pages).to(tokens.device)
        heads = pages[:, None] * 2 * num_kv_heads + np.arange(2 * num_kv_heads)[:, None]
        self.heads = torch.from_numpy(heads).to(tokens.device)

    @property
    def room(self) -> int:
        """Tokens that the pages of a stream hold."""
        return self._pages.shape[1] * PAGE_TOKENS

    def next(self, past: Tensor) -> Tensor:
        """Where keys and values go of tokens that follow `past` [s] others: pages, places in them [2, s]."""
        page = self._pages.gather(1, (past // PAGE_TOKENS)[:, None])[:, 0]
        return torch.stack([page, past % PAGE_TOKENS])


@dataclass(frozen=True)
class At:
    """What rows of some `Places` need to know at a step: all of [s, …]."""

    writes: Tensor
    mask: Tensor
    rotary: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Depth:
    """What runs at a depth: rows by layer, their places and pages, and the weights of own rows and visits.

    `visits` lists, for first and for second choices, the rows of the outputs, the generations that they are
    added to, and their weights.
    """

    rows: LayerRows
    places: Places
    cache: DepthCache
    own: Tensor | None
    visits: Sequence[tuple[Tensor, Tensor, Tensor]]

    def mixed(self, outputs: Tensor) -> Tensor:
        """The mixture [n, d] of the outputs [s, d]."""
        if self.own is None:
            return outputs
        total = outputs[: len(self.own)].to(self.own.dtype) * self.own[:, None]
        for rows, tokens, weights in self.visits:
            total.index_add_(0, tokens, outputs.index_select(0, rows).to(total.dtype) * weights[:, None])
        return total.to(outputs.dtype)


class GroupedDecoding:
    """What running generations go through for their next token, depth by depth."""

    def __init__(self, layers: GroupedLayers, head_dim: int, options: AttentionOptions) -> None:
        self._layers = layers
        self._head_dim = head_dim
        self._options = options
        self._depths: list[Depth] = []
        self._places: dict[bytes, Places] = {}
        self._factors: Factors = ()
        self._replay = Replay(layers.device)

    def add_depth(
        self, stage: Stage, numbers: Sequence[int], pages: Indices, cache: DepthCache, plan: RoutePlan
    ) -> None:
        """The next depth: its layer calls, of which the first is the own layer on all rows.

        `pages` [places, p] are those of the stream that each place of the stage writes and reads.
        """
        key = stage.rows.tobytes() + pages.tobytes()
        if key not in self._places:
            self._places[key] = Places(stage.tokens, pages, self._options.num_kv_heads)
        # The graph reads them where they are: they have to outlive the batch that they were made for.
        self._factors = self._layers.factors_of(stage.lora)
        rows, visits = self._layers.rows_of(stage, numbers), _visits(plan, stage.tokens.device)
        self._depths.append(Depth(rows, self._places[key], cache, plan.own, visits))

    def step(self, hidden: Tensor, past: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Embeddings [n, d] of one new token each, `past` [n] tokens being cached → the last outputs.

        `rotary` is (cos, sin) [n, head_dim] for families that rotate queries and keys.
        """
        return self._replay(self._run, hidden, past, *(rotary or ()))

    def _run(self, hidden: Tensor, past: Tensor, *rotary: Tensor) -> Tensor:
        at = {id(places): self._at(places, past, rotary) for places in self._places.values()}
        for depth in self._depths:
            rows, x = depth.rows, hidden.index_select(0, depth.rows.tokens)
            projected = rows.restored(self._layers.project_rows(x, rows, self._factors))
            attended = rows.sorted(self._attend(projected, depth, at[id(depth.places)]))
            hidden = depth.mixed(rows.restored(self._layers.finish_rows(x, attended, rows, self._factors)))
        return hidden

    def _at(self, places: Places, past: Tensor, rotary: Sequence[Tensor]) -> At:
        past = past.index_select(0, places.tokens)
        keys, newest = torch.arange(places.room, device=past.device), past[:, None, None, None]
        mask = keys <= newest
        if self._options.window is not None:
            mask = mask & (keys > newest - self._options.window)
        cos_and_sin = [values.index_select(0, places.tokens) for values in rotary]
        return At(places.next(past), mask, (cos_and_sin[0], cos_and_sin[1]) if cos_and_sin else None)

    def _attend(self, projected: Tensor, depth: Depth, at: At) -> Tensor:
        num_kv_heads = self._options.num_kv_heads
        heads = projected.view(len(projected), -1, self._head_dim)
        if at.rotary is not None:
            heads = rotated(heads, num_kv_heads, *at.rotary)
        queries, kv = heads[:, : -2 * num_kv_heads, None], heads[:, -2 * num_kv_heads :]
        depth.cache.write(at.writes, kv)
        keys, values = depth.cache.read(depth.places.heads).to(queries.dtype).split(num_kv_heads, dim=1)
        attended = scaled_attention(queries, keys, values, at.mask, False, self._options.scaling)
        return attended.flatten(1)


def _visits(plan: RoutePlan, device: torch.device) -> list[tuple[Tensor, Tensor, Tensor]]:
    """First choices, then second ones, as in `Depth`; a generation is one row."""
    found = []
    for choice in np.unique(plan.choices):
        assert plan.own is not None
        assert plan.weights is not None
        chosen = np.flatnonzero(plan.choices == choice)
        places = len(plan.own) + chosen, plan.requests[chosen], chosen
        rows, tokens, at = (torch.from_numpy(values).to(device) for values in places)
        found.append((rows, tokens, plan.weights.index_select(0, at)))
    return found
