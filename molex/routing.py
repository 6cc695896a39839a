"""Votes and routes: which layers run at a depth, for which requests, with which weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from molex.adapter import Adapter
from molex.config import MolexConfig, VoteConfig
from molex.packing import Packed

SMALLEST_PROBABILITY = 1e-12


@dataclass(frozen=True)
class Choice:
    """The layers that one request chose at one depth, and their weights, which sum to 1."""

    layers: tuple[int, ...]
    weights: tuple[float, ...]


Route = tuple[Choice, ...]
"""The choices of one request at its mixed depths, in order. Empty where nothing mixes."""


def flat_route(route: Route) -> list[int | tuple[int, ...]]:
    """The layer chosen at each mixed depth; for top-2 the pair of layers, the one with more votes first."""
    return [c.layers[0] if len(c.layers) == 1 else c.layers for c in route]


@dataclass(frozen=True)
class RouteGroup:
    """The requests that were routed to one layer at one depth.

    `choices[i]` is 1 where it is the first choice of `requests[i]`, 2 where the second; `weights` [m] is what
    the layer's output is multiplied by.
    """

    layer: int
    requests: list[int]
    choices: list[int]
    weights: Tensor


@dataclass(frozen=True)
class RoutePlan:
    """One depth of a batch: z' = own · L_t(z) + Σ_groups weights · L_layer(z).

    `own` is [r], or None where no request mixes and z' = L_t(z).
    """

    own: Tensor | None
    groups: list[RouteGroup]


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

    `tokens` are their voting tokens, in order of the requests; None where those are all packed tokens.
    """

    molex: MolexConfig
    requests: list[int]
    lengths: list[int]
    tokens: Tensor | None
    owners: Tensor


class Router:
    """The routes of one batch, depth by depth.

    `adapters` are the distinct adapters of the batch, which `packed.members` indexes; `voters[i]` is how many
    leading tokens of request i vote; `pinned[i]` is its route, if it was decided in an earlier pass.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        packed: Packed,
        voters: Sequence[int],
        pinned: Sequence[Route | None],
    ) -> None:
        self.adapters = adapters
        self.packed = packed
        self.voters = voters
        self.pinned = pinned
        self.balance_losses: list[Tensor] = []
        self._choices: list[list[Choice]] = [[] for _ in range(len(packed))]
        self._electorates: dict[tuple[int, ...], list[_Electorate]] = {}
        self._pairs = [a.mixing_pairs().to(packed.device) if a.molex else None for a in adapters]

    @property
    def routes(self) -> list[Route]:
        """The route of each request, once every depth has been planned."""
        return [
            tuple(made) if pinned is None else pinned
            for made, pinned in zip(self._choices, self.pinned, strict=True)
        ]

    def plan(self, depth: int, hidden: Tensor) -> RoutePlan:
        """Decide a depth from its input [n, d]."""
        mixing = [i for i, m in enumerate(self.packed.members) if depth in self.adapters[m].gates]
        if not mixing:
            return RoutePlan(None, [])
        voting = [i for i in mixing if self.pinned[i] is None]
        following = [i for i in mixing if self.pinned[i] is not None]
        entries: list[tuple[int, int, int]] = []
        shares: list[Tensor] = []
        for electorate in self._electorates_of(voting):
            ballots = self._ballots(electorate, depth, hidden)
            election = elect(ballots, electorate.molex.vote, electorate.molex.top_k)
            if torch.is_grad_enabled():
                self.balance_losses.append(load_balance(ballots))
            shares.append(_differentiable_weights(election, ballots, electorate.molex).flatten())
            layers = election.layers.tolist()
            for request, chosen, weights in zip(
                electorate.requests, layers, election.weights.tolist(), strict=True
            ):
                self._choices[request].append(Choice(tuple(chosen), tuple(weights)))
                entries += [(request, layer, n) for n, layer in enumerate(chosen, start=1)]
        if following:
            chosen_earlier = [(i, self._pinned_choice(i, depth)) for i in following]
            entries += [(i, layer, n) for i, c in chosen_earlier for n, layer in enumerate(c.layers, start=1)]
            weights = [weight for _, choice in chosen_earlier for weight in choice.weights]
            shares.append(torch.tensor(weights, dtype=torch.float64, device=hidden.device))
        return self._plan(depth, mixing, entries, torch.cat(shares))

    def _pinned_choice(self, request: int, depth: int) -> Choice:
        route, molex = self.pinned[request], self.adapters[self.packed.members[request]].molex
        assert route is not None
        assert molex is not None
        return route[molex.mixed_depths.index(depth)]

    def _electorates_of(self, voting: list[int]) -> list[_Electorate]:
        """The voting requests by voting rule; the same at every depth where the same requests vote."""
        key = tuple(voting)
        if key not in self._electorates:
            by_rule: dict[tuple[VoteConfig, int, str], list[int]] = defaultdict(list)
            for i in voting:
                molex = self.adapters[self.packed.members[i]].molex
                assert molex is not None
                by_rule[molex.vote, molex.top_k, molex.gate_gradient].append(i)
            self._electorates[key] = [self._electorate(requests) for requests in by_rule.values()]
        return self._electorates[key]

    def _electorate(self, requests: list[int]) -> _Electorate:
        molex = self.adapters[self.packed.members[requests[0]]].molex
        assert molex is not None
        device = self.packed.device
        lengths = [self.voters[i] for i in requests]
        tokens: Tensor | None = None
        if sum(lengths) < self.packed.num_tokens:
            everything = torch.arange(self.packed.num_tokens, device=device)
            starts = [self.packed.offsets[i] for i in requests]
            tokens = torch.cat([everything[s : s + n] for s, n in zip(starts, lengths, strict=True)])
        owners = torch.arange(len(requests), device=device).repeat_interleave(
            torch.tensor(lengths, device=device)
        )
        return _Electorate(molex, requests, lengths, tokens, owners)

    def _ballots(self, electorate: _Electorate, depth: int, hidden: Tensor) -> Ballots:
        voting = hidden if electorate.tokens is None else hidden.index_select(0, electorate.tokens)
        # Converted for all gates at once; they are in at least float32.
        voting = voting.to(torch.promote_types(voting.dtype, torch.float32))
        logits = self._gate_logits(electorate, depth, voting)
        return Ballots(logits, electorate.owners, len(electorate.requests))

    def _gate_logits(self, electorate: _Electorate, depth: int, hidden: Tensor) -> Tensor:
        """Each adapter's gate on its own voting tokens; the electorate lists them adapter by adapter."""
        pieces: list[Tensor] = []
        first_token = first = 0
        members = [self.packed.members[i] for i in electorate.requests]
        while first < len(members):
            last = first
            while last < len(members) and members[last] == members[first]:
                last += 1
            lengths = electorate.lengths[first:last]
            end_token = first_token + sum(lengths)
            gate = self.adapters[members[first]].gates[depth]
            pieces.append(gate.logits(hidden[first_token:end_token], lengths))
            first, first_token = last, end_token
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _plan(
        self, depth: int, mixing: list[int], entries: list[tuple[int, int, int]], shares: Tensor
    ) -> RoutePlan:
        own, routed = self._pairs_at(depth, mixing)
        place = {request: n for n, request in enumerate(mixing)}
        factors = shares.to(routed) * routed[[place[request] for request, _, _ in entries]]
        weights = torch.ones(len(self.packed), dtype=own.dtype, device=own.device)
        weights = weights.index_put((torch.tensor(mixing, device=own.device),), own)
        by_layer: dict[int, list[int]] = defaultdict(list)
        for n, (_, layer, _) in enumerate(entries):
            by_layer[layer].append(n)
        if stayed := by_layer.pop(depth, None):
            # The routed layer is the own one: it runs once, with both weights.
            at = torch.tensor([entries[n][0] for n in stayed], device=own.device)
            weights = weights.index_add(0, at, factors[stayed])
        groups = []
        for layer, members in sorted(by_layer.items()):
            members.sort(key=lambda n: entries[n][0])
            requests = [entries[n][0] for n in members]
            groups.append(RouteGroup(layer, requests, [entries[n][2] for n in members], factors[members]))
        return RoutePlan(weights, groups)

    def _pairs_at(self, depth: int, mixing: list[int]) -> tuple[Tensor, Tensor]:
        """(w_own, w_routed), each [m], of the mixing requests."""
        members = [self.packed.members[i] for i in mixing]
        rows = {member: self._pair(member, depth) for member in dict.fromkeys(members)}
        place = {member: n for n, member in enumerate(rows)}
        index = torch.tensor([place[member] for member in members], device=self.packed.device)
        both = torch.stack(list(rows.values())).index_select(0, index)
        return both[:, 0], both[:, 1]

    def _pair(self, member: int, depth: int) -> Tensor:
        pairs, molex = self._pairs[member], self.adapters[member].molex
        assert pairs is not None
        assert molex is not None
        return pairs[molex.mixed_depths.index(depth)]


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
