"""The plan of a depth: which layers run, for which requests, with which weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from torch import Tensor

from molex.packing import Indices, starts_of_runs


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
        bounds = pairwise([*starts.tolist(), len(self.layers)])
        return [
            (layer, self.requests[start:end], self.choices[start:end])
            for layer, (start, end) in zip(self.layers[starts].tolist(), bounds, strict=True)
        ]


_NOBODY = np.empty(0, dtype=np.int64)
NO_ROUTES = RoutePlan(None, _NOBODY, _NOBODY, _NOBODY, None)
"""A depth at which no request mixes."""
