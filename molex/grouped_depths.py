"""Depths one after the other, without waiting for the device, on which votes decide what layers run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from molex.choices import CHOICES, ChoiceTable, top_k
from molex.forward import Forward, LayerCall
from molex.grouped.layers import GroupedLayers
from molex.packing import Indices, Packed
from molex.plan import NO_ROUTES
from molex.routing import Electorate, Route, Router

ON_DEVICE = -1
"""In place of a layer's number that only the device knows."""


@dataclass(frozen=True)
class Visits:
    """The requests [v] that visit a routed layer where the same adapters mix.

    The `num_first` first choices come before the second ones. `calls` has a call of each. `sources` [1 + v]
    is where the own layer and then theirs are in a line of the layers; `of` is `requests` on the device.
    """

    requests: Indices
    num_first: int
    calls: list[LayerCall]
    sources: Tensor
    of: Tensor


class Mixture:
    """Where outputs lie and belong that are to be added up, by the tokens of a layout."""

    def __init__(self, layout: Packed, visits: Visits) -> None:
        lengths = layout.lengths[visits.requests]
        tokens = layout.tokens(visits.requests)
        num_first = int(lengths[: visits.num_first].sum())
        upload = partial(_uploaded, device=layout.device)
        self._owners = upload(layout.owners)
        self._visits = upload(np.repeat(np.arange(len(lengths)), lengths))
        self._tokens = [upload(some) for some in (tokens[:num_first], tokens[num_first:]) if len(some)]
        self._sizes = [len(self._owners), *map(len, self._tokens)]

    def mixed(self, outputs: Tensor, own: Tensor, weights: Tensor) -> Tensor:
        """own · L_t(z) + Σ_visits weight · L_layer(z), with weights own [r] and of visits [v].

        `outputs` are those of the own layer, then those of the visits; summed in the weights' precision.
        """
        by_token = torch.cat([own.index_select(0, self._owners), weights.index_select(0, self._visits)])
        total, *routed = (outputs.to(own.dtype) * by_token[:, None]).split(self._sizes)
        # First and second choices apart: a sum must not depend on which of two additions comes first.
        for tokens, values in zip(self._tokens, routed, strict=True):
            total.index_add_(0, tokens, values)
        mixed: Tensor = total.to(outputs.dtype)
        return mixed


class GroupedDepths:
    """One depth after the other, where layers are `GroupedLayers`.

    Which tokens take part in a depth follows from who mixes there; which layers they go through is a tensor.
    A request whose routed layer is the own one goes through it twice, with the same sum.
    """

    balance_losses: Sequence[Tensor] = ()
    depths_together = 1

    def __init__(self, forward: Forward, voters: Sequence[int]) -> None:
        self._forward = forward
        self._num_layers, self._count = forward.backbone.num_layers, len(forward.rows)
        pinned = [row.route for row in forward.rows]
        self._router = Router(forward.adapters, forward.packed, voters, pinned)
        self._choices = ChoiceTable(forward.rows, self._num_layers)
        device = forward.backbone.device
        own = np.arange(self._num_layers)[:, None]
        chosen = self._choices.layers.reshape(self._num_layers, -1)
        # A line [2 r + 1] of each depth: first and second choices by request, and the own layer.
        self._layers = torch.from_numpy(np.concatenate([chosen, own], axis=1)).to(device)
        self._shares = torch.from_numpy(self._choices.shares).flatten(1).to(device)
        self._visits: dict[tuple[bool, ...], Visits] = {}
        self._mixtures: dict[tuple[tuple[bool, ...], bool], Mixture] = {}
        self._places: dict[Electorate, Tensor] = {}

    @staticmethod
    def can_run(forward: Forward) -> bool:
        """Whether layers are grouped and share attention."""
        return isinstance(forward.backbone.layers, GroupedLayers) and forward.backbone.layers_share_attention

    @property
    def distinct_layers(self) -> int:
        """Routed layers that have run, summed over depths. Waits for the device."""
        chosen: list[set[int]] = [set() for _ in range(self._num_layers)]
        for number, row in enumerate(self._forward.rows):
            for depth in row.adapter.gates:
                chosen[depth].update(self._decided.layers[depth, number, : top_k(row.adapter)].tolist())
        return sum(len(layers - {depth}) for depth, layers in enumerate(chosen))

    @property
    def routes(self) -> list[Route]:
        """The route of each row, once all depths have run. Waits for the device."""
        return self._decided.routes

    @cached_property
    def _decided(self) -> ChoiceTable:
        """The choices on the host, once all depths have run."""
        table, shape = self._choices, self._choices.layers.shape
        table.layers[:] = self._layers[:, :-1].view(shape).cpu().numpy()
        table.shares[:] = self._shares.view(shape).cpu().numpy()
        return table

    def run(self, hidden: Tensor, first: int, count: int) -> Tensor:
        """Run `count` depths from `first` on, whose input is [n, d]; returns the output of the last."""
        for depth in range(first, first + count):
            mixes = self._router.mixing_at(depth)
            if any(mixes):
                for electorate in self._router.electorates(mixes):
                    self._vote(electorate, depth, hidden)
                hidden = self._run_mixing(depth, mixes, hidden)
            else:
                hidden = self._forward.run_depth(depth, NO_ROUTES, hidden)
        return hidden

    def _vote(self, electorate: Electorate, depth: int, hidden: Tensor) -> None:
        _, election = self._router.election(electorate, depth, hidden)
        places = self._places_of(electorate)
        self._layers[depth].index_copy_(0, places, election.layers.flatten())
        self._shares[depth].index_copy_(0, places, election.weights.flatten().to(self._shares.dtype))

    def _places_of(self, electorate: Electorate) -> Tensor:
        """Where the choices of some requests are in the line of a depth."""
        if electorate not in self._places:
            self._places[electorate] = self._tensor(electorate.visitors * CHOICES + electorate.choices - 1)
        return self._places[electorate]

    def _visits_of(self, mixes: tuple[bool, ...]) -> Visits:
        if mixes not in self._visits:
            mixing = np.flatnonzero(np.array(mixes)[self._forward.packed.members])
            counts = np.array([top_k(self._forward.rows[i].adapter) for i in mixing])
            who = [mixing[counts > choice] for choice in range(CHOICES)]
            requests, choices = np.concatenate(who), np.repeat(np.arange(CHOICES), list(map(len, who)))
            sources = np.append(self._count * CHOICES, requests * CHOICES + choices)
            parts = zip(np.split(requests, len(requests)), np.split(choices + 1, len(choices)), strict=True)
            calls = [LayerCall(ON_DEVICE, request, choice) for request, choice in parts]
            of, where = self._tensor(requests), self._tensor(sources)
            self._visits[mixes] = Visits(requests, len(mixing), calls, where, of)
        return self._visits[mixes]

    def _run_mixing(self, depth: int, mixes: tuple[bool, ...], hidden: Tensor) -> Tensor:
        forward, visits = self._forward, self._visits_of(mixes)
        numbers = self._layers[depth].index_select(0, visits.sources)
        [outputs] = forward.run_calls(depth, [forward.own_call(depth), *visits.calls], numbers, hidden)
        own, routed = self._router.pairs[depth]
        shares = self._shares[depth].index_select(0, visits.sources[1:])
        weights = shares.to(routed.dtype) * routed.index_select(0, visits.of)
        return self._mixture_of(mixes, depth).mixed(outputs, own, weights)

    def _mixture_of(self, mixes: tuple[bool, ...], depth: int) -> Mixture:
        key = mixes, self._forward.is_last(depth)
        if key not in self._mixtures:
            self._mixtures[key] = Mixture(self._forward.leaving(depth), self._visits_of(mixes))
        return self._mixtures[key]

    def _tensor(self, values: Indices) -> Tensor:
        return _uploaded(values, self._forward.backbone.device)


def _uploaded(values: Indices, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)
