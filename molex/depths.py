"""How the rows of a pass go through the depths: planned one by one, or many in one call of the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from molex.adapter import BARE, Adapter
from molex.choices import ChoiceTable, top_k
from molex.errors import InputError
from molex.forward import Forward
from molex.gate import LinearGate
from molex.native.layers import NativeLayers, is_linear
from molex.routing import Route, Router

SCORES = {"mode": 0, "softmax": 1, "sigmoid": 2}
TOKENS_PER_CALL = 4096
"""The work of a call, in tokens that run through one depth: whoever watches a pass sees calls end."""


class Depths(Protocol):
    """How the rows of a pass go through the depths."""

    @property
    def depths_together(self) -> int:
        """How many of them a call should run."""

    @property
    def distinct_layers(self) -> int:
        """Routed layers that have run, summed over depths."""

    @property
    def routes(self) -> list[Route]:
        """The route of each row, once all depths have run."""

    @property
    def balance_losses(self) -> Sequence[Tensor]:
        """Of each vote, where gradients are taken."""

    def run(self, hidden: Tensor, first: int, count: int) -> Tensor:
        """Run `count` depths from `first` on, whose input is [n, d]; returns the output of the last."""


class PlannedDepths:
    """One depth after the other, each planned by a router."""

    depths_together = 1

    def __init__(self, forward: Forward, voters: Sequence[int]) -> None:
        layers, pinned = forward.backbone.layers, [row.route for row in forward.rows]
        self._forward = forward
        self._router = Router(
            forward.adapters, forward.packed, voters, pinned, layers.gate_logits, layers.elect
        )
        self.distinct_layers = 0

    @property
    def routes(self) -> list[Route]:
        return self._router.routes

    @property
    def balance_losses(self) -> Sequence[Tensor]:
        return self._router.balance_losses

    def run(self, hidden: Tensor, first: int, count: int) -> Tensor:
        for depth in range(first, first + count):
            plan = self._router.plan(depth, hidden)
            self.distinct_layers += len(plan.groups)
            hidden = self._forward.run_depth(depth, plan, hidden)
        return hidden


class MixtureTable:
    """What an adapter mixes with, for the kernels, at each of T depths.

    `gates` [T, 2] are the addresses of the weight and bias of its linear gates, 0 where a depth does not mix;
    `weights` [T, 2] those of own and routed layers. The tensors behind the addresses are the adapter's.
    """

    def __init__(self, adapter: Adapter, num_layers: int, width: int) -> None:
        """For a base of that many layers and that width.

        Raises InputError for a gate that is not of such a base: the kernels read what the addresses promise.
        """
        self.fits = num_layers, width
        gates = np.zeros((num_layers, 2), dtype=np.int64)
        weights = np.tile(np.array([1, 0], dtype=np.float32), (num_layers, 1))
        for depth, gate in adapter.gates.items():
            assert isinstance(gate, LinearGate)
            if (
                depth >= num_layers
                or gate.weight.shape != (num_layers, width)
                or len(gate.bias) != num_layers
            ):
                raise InputError(f"the gate of depth {depth} does not fit the base model")
            gates[depth] = gate.weight.data_ptr(), gate.bias.data_ptr()
        if adapter.gates:
            weights[sorted(adapter.gates)] = adapter.mixing_pairs().detach().float()
        self.gates, self.weights = torch.from_numpy(gates), torch.from_numpy(weights)


_tables: WeakKeyDictionary[Adapter, MixtureTable] = WeakKeyDictionary()
"""Of adapters that mix. They go with the adapter."""
_unmixed = cache(partial(MixtureTable, BARE))


def _table(adapter: Adapter, num_layers: int, width: int) -> MixtureTable:
    if not adapter.gates:
        return _unmixed(num_layers, width)
    table = _tables.get(adapter)
    if table is None or table.fits != (num_layers, width):
        table = MixtureTable(adapter, num_layers, width)
        if not adapter.parameters():  # Else its mixture is being learned, and soon another one.
            _tables[adapter] = table
    return table


class NativeDepths:
    """As many depths as are wanted in one call of the kernels, votes among them, for linear gates."""

    balance_losses: Sequence[Tensor] = ()

    def __init__(self, forward: Forward, voters: Sequence[int]) -> None:
        assert isinstance(forward.backbone.layers, NativeLayers)
        self._forward = forward
        self._layers = forward.backbone.layers
        self._voters = voters
        num_layers, count = forward.backbone.num_layers, len(forward.rows)
        self._choices = ChoiceTable(forward.rows, num_layers)
        width = forward.backbone.spec.hidden_size
        tables = [_table(adapter, num_layers, width) for adapter in forward.adapters]
        self._depths = torch.classes.molex.Depths(
            self._layers.packed,
            torch.tensor([self._request(i) for i in range(count)]),
            torch.from_numpy(forward.pages),
            [depth.pages for depth in forward.cache.depths] if forward.cache is not None else [],
            torch.stack([table.gates for table in tables]),
            torch.stack([table.weights for table in tables]),
            torch.from_numpy(self._choices.layers),
            torch.from_numpy(self._choices.shares),
            self._layers.factors_of(forward.lora),
        )

    @staticmethod
    def can_run(forward: Forward) -> bool:
        """Whether the kernels do all that a pass needs."""
        backbone = forward.backbone
        return (
            isinstance(backbone.layers, NativeLayers)
            and backbone.layers_share_attention
            and all(is_linear(gate) for adapter in forward.adapters for gate in adapter.gates.values())
        )

    @property
    def depths_together(self) -> int:
        """How many of them a call should run."""
        return max(1, TOKENS_PER_CALL // self._forward.packed.num_tokens)

    @property
    def distinct_layers(self) -> int:
        """Routed layers that have run, summed over depths."""
        count: int = self._depths.routed_layers()
        return count

    def run(self, hidden: Tensor, first: int, count: int) -> Tensor:
        """Run `count` depths from `first` on, whose input is [n, d]; returns the output of the last."""
        backbone, packed = self._forward.backbone, self._forward.packed
        options = backbone.attention_options
        cos, sin = self._forward.rotary or (torch.empty(0), torch.empty(0))
        output: Tensor = self._depths.run(
            hidden.contiguous(),
            first,
            first + count,
            backbone.num_heads,
            options.num_kv_heads,
            backbone.head_dim,
            options.scaling,
            packed.causal,
            options.window or 0,
            torch.from_numpy(packed.positions),
            cos.float().contiguous(),
            sin.float().contiguous(),
        )
        return output

    @property
    def routes(self) -> list[Route]:
        """The route of each row, once all depths have run."""
        return self._choices.routes

    def _request(self, number: int) -> list[int]:
        """A line of the kernels' table of requests."""
        forward = self._forward
        row, molex = forward.rows[number], forward.rows[number].adapter.molex
        votes = molex is not None and row.route is None
        score = "mode" if molex is None or molex.vote.rule == "mode" else molex.vote.score
        return [
            len(row.token_ids),
            row.start,
            int(forward.packed.members[number]),
            self._voters[number] if votes else 0,
            SCORES[score],
            top_k(row.adapter),
            int(forward.first_needed[number]),
            int(forward.result.lengths[number]),
        ]
