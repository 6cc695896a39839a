"""Votes and routes: which layers run at a depth, for which requests, with which weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from molex.adapter import Adapter
from molex.config import MolexConfig, VoteConfig
from molex.gate import Gate, gate_logits
from molex.packing import Indices, Packed, ranges, starts_of_runs

SMALLEST_PROBABILITY = 1e-12


class Choice(NamedTuple):
    """The layers that one request chose at one depth, and their weights, which sum to 1."""

    layers: tuple[int, ...]
    weights: tuple[float, ...]


@cache
def _sole_choice(layer: int) -> Choice:
    """One object for all requests that choose a layer: a batch makes thousands of choices."""
    return Choice((layer,), (1.0,))


Route = tuple[Choice, ...]
"""The choices of one request at its mixed depths, in order. Empty where nothing mixes."""


def flat_route(route: Route) -> list[int | tuple[int, ...]]:
    """The layer chosen at each mixed depth; for top-2 the pair of layers, the one with more votes first."""
    return [c.layers[0] if len(c.layers) == 1 else c.layers for c in route]


@dataclass(frozen=True)
class RoutePlan:
    """One depth of a batch: z' = own · L_t(z) + Σ_visits weight · L_layer(z).

    `own` is [r], or None where no request mixes and z' = L_t(z). A visit is a request that runs through a
    routed layer, which is its first or second choice: `layers`, `requests` and `choices` [v] list the visits
    in order of layer and request, `weights` [v] is what the layer's output is multiplied by.
    """

    own: Tensor | None
    layers: Indices
    requests: Indices
    choices: Indices
    weights: Tensor | None

    @cached_property
    def groups(self) -> list[tuple[int, Indices, Indices]]:
        """Each routed layer with its requests and which choice of theirs it is."""
        starts = starts_of_runs(self.layers)
        pieces = (np.split(values, starts[1:]) for values in (self.requests, self.choices))
        return list(zip(self.layers[starts].tolist(), *pieces, strict=False))


_NOBODY = np.empty(0, dtype=np.int64)
NO_ROUTES = RoutePlan(None, _NOBODY, _NOBODY, _NOBODY, None)
"""A depth at which no request mixes."""


@dataclass(frozen=True)
class Ballots:
    """Gate logits [n, T] of voting tokens, and the request 0..v-1 that each of them belongs to."""

    logits: Tensor
    owners: Tensor
    num_requests: int

    @cached_property
    def first_choices(self) -> Tensor:
        """The layer [n] with each token's largest logit, the smallest index where several have it."""
        return self.logits.argmax(dim=-1)

    @cached_property
    def counts(self) -> Tensor:
        """How many tokens [v, T] of each request have each layer as first choice."""
        num_layers = self.logits.shape[1]
        cells = (self.owners * num_layers + self.first_choices).bincount(
            minlength=self.num_requests * num_layers
        )
        return cells.view(self.num_requests, num_layers)

    @cached_property
    def probabilities(self) -> Tensor:
        """The softmax of the logits averaged over the tokens of each request [v, T]."""
        return self.mean(self.logits.softmax(dim=-1))

    def mean(self, values: Tensor) -> Tensor:
        """Values [n, T] averaged over the tokens of each request [v, T]."""
        sums = values.new_zeros(self.num_requests, values.shape[1]).index_add_(0, self.owners, values)
        return sums / self.owners.bincount(minlength=self.num_requests)[:, None]


@dataclass(frozen=True)
class Election:
    """The k layers [v, k] that each request chose, most votes first, and their weights [v, k], of sum 1."""

    layers: Tensor
    weights: Tensor


def elect(ballots: Ballots, vote: VoteConfig, top_k: int) -> Election:
    """Let the tokens of each request vote.

    With `mode` a layer's score is the number of tokens whose largest logit it has, with `mean` its score
    averaged over the tokens. The k layers with the largest scores win, ties to the smallest index.
    """
    if vote.rule == "mode":
        scores = ballots.counts
    elif vote.score == "softmax":
        scores = ballots.probabilities
    else:
        scores = ballots.mean(ballots.logits.sigmoid())
    layers = scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    if top_k == 1:
        return Election(layers, ballots.logits.new_ones(layers.shape))
    return Election(layers, _shares(ballots.probabilities.detach().gather(1, layers)))


def _shares(chosen: Tensor) -> Tensor:
    """Probabilities [v, k] scaled to sum to 1; even shares where all of them are too small for a float."""
    total = chosen.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, chosen / total, torch.full_like(chosen, 1 / chosen.shape[1]))


def load_balance(ballots: Ballots) -> Tensor:
    """T · Σ_e f_e · p̄_e: f_e the share of voting tokens whose argmax is layer e, p̄_e its mean probability.

    Least, 1, where the layers are chosen evenly (the auxiliary loss of Switch Transformers, Fedus et al.
    2021, eq. 4). The mean probability is taken over requests.
    """
    shares = ballots.counts.sum(dim=0) / len(ballots.owners)
    return ballots.logits.shape[1] * (shares * ballots.probabilities.mean(dim=0)).sum()


@dataclass(frozen=True)
class _Electorate:
    """Requests that vote by one rule.

    `tokens` are their voting tokens in order of the requests; `owners` says which of the requests each
    belongs to. `wards` lists the adapters, each with the numbers of its voting tokens by request.
    """

    molex: MolexConfig
    requests: Indices
    tokens: Tensor
    owners: Tensor
    wards: list[tuple[Adapter, list[int]]]


GateLogits = Callable[[Sequence[Gate], Sequence[Sequence[int]], Tensor, Tensor], Tensor]
"""See `molex.gate.gate_logits`."""


class Router:
    """The routes of one batch, depth by depth.

    `adapters` are the distinct adapters of the batch, which `packed.members` indexes; `voters[i]` is how many
    leading tokens of request i vote; `pinned[i]` is its route, if it was decided in an earlier pass;
    `gate_logits` runs the gates.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        packed: Packed,
        voters: Sequence[int],
        pinned: Sequence[Route | None],
        gate_logits: GateLogits = gate_logits,
    ) -> None:
        self.adapters = adapters
        self._gate_logits = gate_logits
        self.packed = packed
        self.voters = np.asarray(voters, dtype=np.int64)
        self.pinned = pinned
        self.balance_losses: list[Tensor] = []
        self._is_pinned = np.array([route is not None for route in pinned])
        self._choices: list[list[Choice]] = [[] for _ in range(len(packed))]
        self._electorates: dict[bytes, list[_Electorate]] = {}
        self._pairs = self._pair_table()

    def _pair_table(self) -> Tensor | None:
        """(w_own, w_routed) [r, depths, 2] of each request, (1, 0) where it does not mix."""
        device = self.packed.device
        pairs = {n: a.mixing_pairs().to(device) for n, a in enumerate(self.adapters) if a.molex is not None}
        if not pairs:
            return None
        depths = 1 + max(max(adapter.gates, default=0) for adapter in self.adapters)
        unmixed = next(iter(pairs.values())).new_tensor([1.0, 0.0]).expand(depths, 2)
        rows = [unmixed] * len(self.adapters)
        for n, mixed in pairs.items():
            rows[n] = unmixed.index_copy(0, self._tensor(np.array(sorted(self.adapters[n].gates))), mixed)
        return torch.stack(rows)[self._tensor(self.packed.members)]

    @property
    def routes(self) -> list[Route]:
        """The route of each request, once every depth has been planned."""
        return [
            tuple(made) if pinned is None else pinned
            for made, pinned in zip(self._choices, self.pinned, strict=True)
        ]

    def plan(self, depth: int, hidden: Tensor) -> RoutePlan:
        """Decide a depth from its input, [n, d] or longer."""
        mixes = np.array([depth in adapter.gates for adapter in self.adapters])
        mixing = mixes[self.packed.members]
        if not mixing.any():
            return NO_ROUTES
        visits: list[Indices] = []
        shares: list[Tensor] = []
        for electorate in self._electorates_of(np.flatnonzero(mixing & ~self._is_pinned)):
            ballots = self._ballots(electorate, depth, hidden)
            election = elect(ballots, electorate.molex.vote, electorate.molex.top_k)
            if torch.is_grad_enabled():
                self.balance_losses.append(load_balance(ballots))
            shares.append(_differentiable_weights(election, ballots, electorate.molex).flatten())
            layers, weights = election.layers.tolist(), election.weights.tolist()
            for request, chosen, share in zip(electorate.requests.tolist(), layers, weights, strict=True):
                choice = _sole_choice(chosen[0]) if len(chosen) == 1 else Choice(tuple(chosen), tuple(share))
                self._choices[request].append(choice)
            visits.append(_visits(electorate.requests, layers))
        if depth in self._followed:
            followed, earned = self._followed[depth]
            visits.append(followed)
            shares.append(earned)
        return self._plan(depth, np.concatenate(visits, axis=1), torch.cat(shares))

    @cached_property
    def _followed(self) -> dict[int, tuple[Indices, Tensor]]:
        """The visits [3, v] at each depth of the requests whose route is pinned, and their shares [v]."""
        visits: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        shares: dict[int, list[float]] = defaultdict(list)
        for request, route in enumerate(self.pinned):
            molex = self.adapters[self.packed.members[request]].molex
            if route is None or molex is None:
                continue
            for depth, choice in zip(molex.mixed_depths, route, strict=True):
                visits[depth] += [(request, layer, n) for n, layer in enumerate(choice.layers, 1)]
                shares[depth] += choice.weights
        return {
            depth: (
                np.array(found).T,
                torch.tensor(shares[depth], dtype=torch.float64, device=self.packed.device),
            )
            for depth, found in visits.items()
        }

    def _electorates_of(self, voting: Indices) -> list[_Electorate]:
        """The voting requests by voting rule; the same at every depth where the same requests vote."""
        key = voting.tobytes()
        if key not in self._electorates:
            by_rule: dict[tuple[VoteConfig, int, str], list[int]] = defaultdict(list)
            for i in voting.tolist():
                molex = self.adapters[self.packed.members[i]].molex
                assert molex is not None
                by_rule[molex.vote, molex.top_k, molex.gate_gradient].append(i)
            self._electorates[key] = [self._electorate(np.array(requests)) for requests in by_rule.values()]
        return self._electorates[key]

    def _electorate(self, requests: Indices) -> _Electorate:
        voters, members = self.voters[requests], self.packed.members[requests]
        firsts = starts_of_runs(members)
        wards = [
            (self.adapters[members[first]], lengths.tolist())
            for first, lengths in zip(firsts, np.split(voters, firsts[1:]), strict=True)
        ]
        molex = wards[0][0].molex
        assert molex is not None
        tokens = torch.from_numpy(ranges(self.packed.offsets[requests], voters)).to(self.packed.device)
        owners = torch.from_numpy(np.repeat(np.arange(len(requests)), voters)).to(self.packed.device)
        return _Electorate(molex, requests, tokens, owners, wards)

    def _ballots(self, electorate: _Electorate, depth: int, hidden: Tensor) -> Ballots:
        """The gate of each adapter on its own voting tokens."""
        gates = [adapter.gates[depth] for adapter, _ in electorate.wards]
        lengths = [lengths for _, lengths in electorate.wards]
        logits = self._gate_logits(gates, lengths, hidden, electorate.tokens)
        return Ballots(logits, electorate.owners, len(electorate.requests))

    def _plan(self, depth: int, visits: Indices, shares: Tensor) -> RoutePlan:
        """`visits` [3, v] are requests, layers and choices, `shares` [v] their parts of the routed weight."""
        assert self._pairs is not None
        own, routed = self._pairs[:, depth].unbind(1)
        requests, layers, choices = visits
        weights = shares.to(routed.dtype) * routed[self._tensor(requests)]
        if (stays := np.flatnonzero(layers == depth)).size:
            # The routed layer is the own one: it runs once, with both weights.
            own = own.index_add(0, self._tensor(requests[stays]), weights[self._tensor(stays)])
        order = np.lexsort((requests, layers))
        order = order[layers[order] != depth]
        return RoutePlan(own, layers[order], requests[order], choices[order], weights[self._tensor(order)])

    def _tensor(self, indices: Indices) -> Tensor:
        return torch.from_numpy(indices).to(self.packed.device)


def _visits(requests: Indices, layers: Sequence[Sequence[int]]) -> Indices:
    """Requests, layers and choices [3, v · k] where request i visits the k layers `layers[i]`."""
    chosen = np.array(layers)
    count, top_k = chosen.shape
    return np.stack([requests.repeat(top_k), chosen.ravel(), np.tile(np.arange(1, top_k + 1), count)])


def _differentiable_weights(election: Election, ballots: Ballots, molex: MolexConfig) -> Tensor:
    """The weights [v, k] of the chosen layers, through which a straight-through gate is trained.

    With `straight_through` each weight is multiplied by p / stop_gradient(p), which is 1 in value and hands
    the gradient of the routed output's weight to the gate's probability p of that layer. It is written as
    1 + (p - stop_gradient(p)) / stop_gradient(p), which is 1 for a p of 0 too.
    """
    if molex.gate_gradient == "none" or not torch.is_grad_enabled():
        return election.weights
    p = ballots.probabilities.gather(1, election.layers)
    constant = p.detach()
    return election.weights * (1 + (p - constant) / constant.clamp_min(SMALLEST_PROBABILITY))
