"""How many floating-point operations a forward pass takes, counted from shapes.

A product of [n, a] and [a, b] is 2·n·a·b operations. Counted are, for every layer that a request runs through
(its own at each depth, and those it was routed to):

    linear layers   2 · n · Σ in·out
    attention       4 · n² · d        scores and weighted sum of n tokens of width d, all heads together
    low-rank        2 · n · Σ r·(in + out)   over the adapted linear layers

At the last depth what comes after attention runs for the pooled token alone. Not counted: embeddings, norms,
activations, softmax, gates, heads, and rows of padding: a rate made of this number is a lower bound of what
the CPU does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from molex.adapter import Adapter, adapted_sites
from molex.backbone import BaseSpec
from molex.routing import Route

PROJECTIONS = ("query", "key", "value")
"""How the modules end that come before attention in BERT and RoBERTa."""


@dataclass(frozen=True)
class Work:
    """One classification that a forward pass answered: its tokens, its adapter and the route it took."""

    tokens: int
    adapter: Adapter
    route: Route


def forward_flops(spec: BaseSpec, batch: Sequence[Work]) -> int:
    """Operations of a packed pass over classifications on an encoder."""
    return sum(_request_flops(spec, work) for work in batch)


def layer_flops(spec: BaseSpec, tokens: int, finished: int, ranks: Mapping[str, int]) -> int:
    """One layer on one request, of which `finished` tokens are needed after attention.

    `ranks` are the ranks of the updates by the names of the adapted modules.
    """
    total = 4 * tokens * tokens * spec.hidden_size
    for name, (inputs, outputs) in spec.modules.items():
        rows = tokens if name.endswith(PROJECTIONS) else finished
        total += 2 * rows * (inputs * outputs + ranks.get(name, 0) * (inputs + outputs))
    return total


def _request_flops(spec: BaseSpec, work: Work) -> int:
    mixed = (
        {} if work.adapter.molex is None else dict(zip(sorted(work.adapter.gates), work.route, strict=True))
    )
    adapted = adapted_sites(work.adapter.config, spec)
    total = 0
    for depth in range(spec.num_layers):
        layers = {depth, *(mixed[depth].layers if depth in mixed else ())}
        finished = 1 if depth == spec.num_layers - 1 else work.tokens
        for layer in layers:
            ranks = _ranks(adapted, layer, work.adapter.rank)
            total += layer_flops(spec, work.tokens, finished, ranks)
    return total


def _ranks(adapted: Collection[tuple[int, str]], layer: int, rank: int) -> dict[str, int]:
    return {module: rank for at, module in adapted if at == layer}


def product_flops(rows: int, inputs: int, outputs: int) -> int:
    """Operations of one product [rows, inputs] · [inputs, outputs]."""
    return 2 * rows * inputs * outputs
