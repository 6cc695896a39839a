"""Routes: each depth is planned from votes, or from routes that were decided before."""

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
from molex.plan import NO_ROUTES, RoutePlan
from molex.votes import Ballots, Election, elect, load_balance

SMALLEST_PROBABILITY = 1e-12


class Choice(NamedTuple):
    """The layers that one request chose at one depth, and their weights, which sum to 1."""

    layers: tuple[int, ...]
    weights: tuple[float, ...]


@cache
def sole_choice(layer: int) -> Choice:
    """One object for all requests that choose a layer: a batch makes thousands of choices."""
    return Choice((layer,), (1.0,))


Route = tuple[Choice, ...]
"""The choices of one request at its mixed depths, in order. Empty where nothing mixes."""


def flat_route(route: Route) -> list[int | tuple[int, ...]]:
    """The layer chosen at each mixed depth; for top-2 the pair of layers, the one with more votes first."""
    return [c.layers[0] if len(c.layers) == 1 else c.layers for c in route]


@dataclass(frozen=True, eq=False)
class Electorate:
    """Requests that vote by one rule.

    `tokens` are their voting tokens in order of the requests; `owners` says which of the requests each
    belongs to. `wards` lists the adapters, `lengths` the numbers of voting tokens of each one's requests.
    `visitors` and `choices` are the requests and choices of `_Visits`.
    """

    molex: MolexConfig
    requests: list[int]
    tokens: Tensor
    owners: Tensor
    wards: list[Adapter]
    lengths: list[list[int]]
    visitors: Indices
    choices: Indices


@dataclass(frozen=True)
class _Visits:
    """Requests that visit layers, as first or second choices of theirs, with their shares of w_routed [v]."""

    requests: Indices
    layers: Indices
    choices: Indices
    shares: Tensor


GateLogits = Callable[[Sequence[Gate], Sequence[Sequence[int]], Tensor, Tensor], Tensor]
"""See `molex.gate.gate_logits`."""
Elect = Callable[[Ballots, VoteConfig, int], Election]
"""See `molex.votes.elect`."""


class Router:
    """The routes of one batch, depth by depth.

    `adapters` are the distinct adapters of the batch, which `packed.members` indexes; `voters[i]` is how many
    leading tokens of request i vote; `pinned[i]` is its route, if it was decided in an earlier pass;
    `gate_logits` runs the gates, `elect` counts the votes.

    A request whose routed layer is the own one visits none, and has the sum of both weights as its own. With
    `visits_own` it visits the own layer like any other.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        packed: Packed,
        voters: Sequence[int],
        pinned: Sequence[Route | None],
        gate_logits: GateLogits = gate_logits,
        elect: Elect = elect,
        *,
        visits_own: bool = False,
    ) -> None:
        self.adapters = adapters
        self._gate_logits = gate_logits
        self._elect = elect
        self._visits_own = visits_own
        self.packed = packed
        self.voters = np.asarray(voters, dtype=np.int64)
        self.pinned = pinned
        self.balance_losses: list[Tensor] = []
        self._is_pinned = np.array([route is not None for route in pinned])
        self._choices: list[list[Choice]] = [[] for _ in range(len(packed))]
        self._electorates: dict[tuple[bool, ...], list[Electorate]] = {}
        self.pairs = self._pair_table()
        """w_own [r] and w_routed [r] at each depth, 1 and 0 where a request does not mix."""

    def _pair_table(self) -> list[tuple[Tensor, Tensor]]:
        device = self.packed.device
        pairs = {n: a.mixing_pairs().to(device) for n, a in enumerate(self.adapters) if a.molex is not None}
        if not pairs:
            return []
        depths = 1 + max(max(adapter.gates, default=0) for adapter in self.adapters)
        unmixed = next(iter(pairs.values())).new_tensor([1.0, 0.0]).expand(depths, 2)
        rows = [unmixed] * len(self.adapters)
        for n, mixed in pairs.items():
            rows[n] = unmixed.index_copy(0, self._tensor(np.array(sorted(self.adapters[n].gates))), mixed)
        table = torch.stack(rows)[self._tensor(self.packed.members)]
        own, routed = (weights.T.contiguous().unbind() for weights in table.unbind(2))
        return list(zip(own, routed, strict=True))

    @property
    def routes(self) -> list[Route]:
        """The route of each request, once every depth has been planned."""
        return [
            tuple(made) if pinned is None else pinned
            for made, pinned in zip(self._choices, self.pinned, strict=True)
        ]

    def plan(self, depth: int, hidden: Tensor) -> RoutePlan:
        """Decide a depth from its input, [n, d] or longer."""
        mixes = self.mixing_at(depth)
        if not any(mixes):
            return NO_ROUTES
        visits = [self._vote(electorate, depth, hidden) for electorate in self.electorates(mixes)]
        if depth in self._followed:
            visits.append(self._followed[depth])
        return self._plan(depth, visits)

    def mixing_at(self, depth: int) -> tuple[bool, ...]:
        """Whether each adapter mixes at a depth."""
        return tuple(depth in adapter.gates for adapter in self.adapters)

    def election(self, electorate: Electorate, depth: int, hidden: Tensor) -> tuple[Ballots, Election]:
        """Have the tokens of some requests vote, with the input of a depth."""
        ballots = self._ballots(electorate, depth, hidden)
        return ballots, self._elect(ballots, electorate.molex.vote, electorate.molex.top_k)

    def _vote(self, electorate: Electorate, depth: int, hidden: Tensor) -> _Visits:
        """Hold the vote of a depth, and keep the choices."""
        ballots, election = self.election(electorate, depth, hidden)
        if torch.is_grad_enabled():
            self.balance_losses.append(load_balance(ballots))
        layers, weights = election.layers.tolist(), election.weights.tolist()
        for request, chosen, share in zip(electorate.requests, layers, weights, strict=True):
            choice = sole_choice(chosen[0]) if len(chosen) == 1 else Choice(tuple(chosen), tuple(share))
            self._choices[request].append(choice)
        shares = _differentiable_weights(election, ballots, electorate.molex).flatten()
        return _Visits(electorate.visitors, np.array(layers).ravel(), electorate.choices, shares)

    @cached_property
    def _followed(self) -> dict[int, _Visits]:
        """The visits at each depth of the requests whose route is pinned."""
        found: dict[int, list[tuple[int, int, int, float]]] = defaultdict(list)
        for request, route in enumerate(self.pinned):
            molex = self.adapters[self.packed.members[request]].molex
            if route is None or molex is None:
                continue
            for depth, (layers, weights) in zip(molex.mixed_depths, route, strict=True):
                choices = range(1, len(layers) + 1)
                found[depth] += zip([request] * len(layers), layers, choices, weights, strict=True)
        return {depth: self._visits(visits) for depth, visits in found.items()}

    def _visits(self, visits: Sequence[tuple[int, int, int, float]]) -> _Visits:
        requests, layers, choices, weights = zip(*visits, strict=True)
        shares = torch.tensor(weights, dtype=torch.float64, device=self.packed.device)
        return _Visits(np.array(requests), np.array(layers), np.array(choices), shares)

    def electorates(self, mixes: tuple[bool, ...]) -> list[Electorate]:
        """The requests that vote where these adapters mix, by voting rule."""
        if mixes not in self._electorates:
            by_rule: dict[tuple[VoteConfig, int, str], list[int]] = defaultdict(list)
            for i in np.flatnonzero(np.array(mixes)[self.packed.members] & ~self._is_pinned).tolist():
                molex = self.adapters[self.packed.members[i]].molex
                assert molex is not None
                by_rule[molex.vote, molex.top_k, molex.gate_gradient].append(i)
            self._electorates[mixes] = [self._electorate(np.array(requests)) for requests in by_rule.values()]
        return self._electorates[mixes]

    def _electorate(self, requests: Indices) -> Electorate:
        voters, members = self.voters[requests], self.packed.members[requests]
        firsts = starts_of_runs(members)
        wards = [self.adapters[member] for member in members[firsts]]
        lengths = [counts.tolist() for counts in np.split(voters, firsts[1:])]
        molex = wards[0].molex
        assert molex is not None
        tokens = self._tensor(ranges(self.packed.offsets[requests], voters))
        owners = self._tensor(np.repeat(np.arange(len(requests)), voters))
        visitors, choices = requests.repeat(molex.top_k), np.tile(np.arange(molex.top_k) + 1, len(requests))
        return Electorate(molex, requests.tolist(), tokens, owners, wards, lengths, visitors, choices)

    def _ballots(self, electorate: Electorate, depth: int, hidden: Tensor) -> Ballots:
        """The gate of each adapter on its own voting tokens."""
        gates = [adapter.gates[depth] for adapter in electorate.wards]
        logits = self._gate_logits(gates, electorate.lengths, hidden, electorate.tokens)
        return Ballots(logits, electorate.owners, len(electorate.requests))

    def _plan(self, depth: int, visits: Sequence[_Visits]) -> RoutePlan:
        own, routed = self.pairs[depth]
        requests = np.concatenate([some.requests for some in visits])
        layers = np.concatenate([some.layers for some in visits])
        choices = np.concatenate([some.choices for some in visits])
        shares = torch.cat([some.shares for some in visits])
        weights = shares.to(routed.dtype) * routed.index_select(0, self._tensor(requests))
        order = np.lexsort((requests, layers))
        if not self._visits_own and (stays := np.flatnonzero(layers == depth)).size:
            own = own.index_add(
                0, self._tensor(requests[stays]), weights.index_select(0, self._tensor(stays))
            )
            order = order[layers[order] != depth]
        weights = weights.index_select(0, self._tensor(order))
        return RoutePlan(own, layers[order], requests[order], choices[order], weights)

    def _tensor(self, indices: Indices) -> Tensor:
        return torch.from_numpy(indices).to(self.packed.device)


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
