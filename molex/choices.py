"""The choices of a batch as arrays, for code that decides routes without Python between depths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from molex.adapter import Adapter
from molex.routing import Choice, Route, sole_choice
from molex.row import Row

CHOICES = 2
"""Routed layers that a request may visit at a depth."""


class ChoiceTable:
    """`layers` and `shares` [T, r, 2]: at each depth the layers that each request chose, and their weights.

    What a pinned route says is there from the beginning; votes fill in the others.
    """

    def __init__(self, rows: Sequence[Row], num_layers: int) -> None:
        self._rows = rows
        self.layers = np.zeros((num_layers, len(rows), CHOICES), dtype=np.int64)
        self.shares = np.zeros((num_layers, len(rows), CHOICES), dtype=np.float32)
        for number, row in enumerate(rows):
            if row.route is None or not row.adapter.gates:
                continue
            for depth, choice in zip(sorted(row.adapter.gates), row.route, strict=True):
                self.layers[depth, number, : len(choice.layers)] = choice.layers
                self.shares[depth, number, : len(choice.layers)] = choice.weights

    @property
    def routes(self) -> list[Route]:
        """The route of each row, once its layers have been chosen at all depths."""
        layers, shares = self.layers.tolist(), self.shares.tolist()
        return [
            tuple(
                _choice(layers[depth][i], shares[depth][i], top_k(row.adapter))
                for depth in sorted(row.adapter.gates)
            )
            if row.route is None
            else row.route
            for i, row in enumerate(self._rows)
        ]


def top_k(adapter: Adapter) -> int:
    """How many layers a request of an adapter visits where it mixes."""
    return 0 if adapter.molex is None else adapter.molex.top_k


def _choice(layers: list[int], shares: list[float], count: int) -> Choice:
    return sole_choice(layers[0]) if count == 1 else Choice(tuple(layers), tuple(shares))
