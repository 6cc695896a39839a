"""Passes at different depths that advance together; where they want the same layer, they share its call.

The engine itself runs one pass at a time (`molex/passes.py`). This is what it would do with depth-wise
joining, for classifications on an encoder, from the same parts: `benchmarks.bench_joining` measures it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from molex import Adapter, MolexModel, Row
from molex.forward import Forward
from molex.lora import BatchLora
from molex.packing import Indices, Packed, ranges, starts_of_runs
from molex.plan import RoutePlan
from molex.routing import Router
from molex.stage import Stage


class Cohort:
    """Classifications that begin together and go through the depths together."""

    def __init__(self, model: MolexModel, rows: Sequence[Row]) -> None:
        adapters = list({id(row.adapter): row.adapter for row in rows}.values())
        lora = BatchLora([adapter.lora for adapter in adapters])
        self.forward = Forward(rows, adapters, lora, None, model.backbone, "last")
        self.packed = self.forward.packed
        pinned = [None] * len(rows)
        layers, voters = model.backbone.layers, self.packed.lengths.tolist()
        self._router = Router(adapters, self.packed, voters, pinned, layers.gate_logits, layers.elect)
        self._hidden = self.forward.embed()
        self._num_depths = model.backbone.num_layers
        self.depth = 0

    @property
    def ended(self) -> bool:
        return self.depth == self._num_depths

    @property
    def hidden(self) -> Tensor:
        """[tokens, d]; once ended those of the first token of each row."""
        return self._hidden

    @property
    def lengths_after(self) -> Indices:
        """How many tokens of each row leave the depth: at the last one those that heads look at."""
        is_last = self.depth == self._num_depths - 1
        return np.ones_like(self.packed.lengths) if is_last else self.packed.lengths

    def plan(self) -> RoutePlan:
        """The routes of the depth that is next."""
        return self._router.plan(self.depth, self._hidden)

    def advance(self) -> None:
        """One depth alone, as the engine does it."""
        self.enter(self.forward.run_depth(self.depth, self.plan(), self._hidden))

    def enter(self, hidden: Tensor) -> None:
        """The next depth, with these hidden states."""
        self._hidden = hidden
        self.depth += 1

    def logits(self) -> list[Tensor]:
        """Those of each row, in the order that they were given in; only once ended."""
        logits = self.forward.logits(self._hidden, "last")
        return [logits[i] for i in np.argsort(self.forward.order)]


class Step:
    """One depth of several cohorts. A visit is a request that runs through its own or a routed layer.

    `packed` are the tokens of all cohorts side by side, `left` those that leave the depth. Visits are in
    order of layer and adapter: `layers` lists the layers and `requests` whose the visits are.
    """

    def __init__(self, cohorts: Sequence[Cohort], members: Sequence[Indices], lora: BatchLora) -> None:
        self._lora = lora
        self.packed = _side_by_side([cohort.packed.lengths for cohort in cohorts], members)
        self.left = _side_by_side([cohort.lengths_after for cohort in cohorts], members)
        sizes = [len(cohort.packed) for cohort in cohorts]
        self.plan = _one_plan([cohort.plan() for cohort in cohorts], sizes)
        wanted = np.concatenate([np.repeat([cohort.depth for cohort in cohorts], sizes), self.plan.layers])
        self._requests = np.concatenate([np.arange(sum(sizes)), self.plan.requests])
        self._order = np.lexsort((self.packed.members[self._requests], wanted))
        starts = starts_of_runs(wanted[self._order])
        self.layers = wanted[self._order][starts].tolist()
        self.requests = self._requests[self._order]
        self._calls = np.split(self.requests, starts[1:])

    @cached_property
    def visits(self) -> Packed:
        return self.packed.subset(self.requests)

    def projecting(self) -> Stage:
        return self._stage(self.packed, np.arange(self.visits.num_tokens))

    def finishing(self) -> Stage:
        return self._stage(self.left, ranges(self.visits.offsets, self.left.lengths[self.requests]))

    def _stage(self, layout: Packed, rows: Indices) -> Stage:
        counts = [int(layout.lengths[requests].sum()) for requests in self._calls]
        runs = [layout.segments(requests) for requests in self._calls]
        tokens = torch.from_numpy(self.packed.tokens(self.requests)[rows])
        return Stage(rows, tokens, counts, counts, runs, self._lora)

    def own_and_routed(self, outputs: Tensor) -> list[Tensor]:
        """The outputs of visits to own layers, by request, and to routed ones, as in the plan's groups."""
        offsets = self.left.subset(self.requests).offsets
        rows = torch.from_numpy(ranges(offsets[np.argsort(self._order)], self.left.lengths[self._requests]))
        own, routed = outputs[rows[: self.left.num_tokens]], outputs[rows[self.left.num_tokens :]]
        sizes = [int(self.left.lengths[requests].sum()) for _, requests, _ in self.plan.groups]
        return [own, *routed.split(sizes)]


class Joined:
    """Advances cohorts by one depth each. `adapters` are all that rows may have."""

    def __init__(self, model: MolexModel, adapters: Sequence[Adapter]) -> None:
        self._backbone = model.backbone
        self._lora = BatchLora([adapter.lora for adapter in adapters])
        self._number_of = {id(adapter): number for number, adapter in enumerate(adapters)}

    def advance(self, cohorts: Sequence[Cohort]) -> None:
        if len(cohorts) == 1:
            cohorts[0].advance()
            return
        step = Step(cohorts, [self._members(cohort) for cohort in cohorts], self._lora)
        layers, hidden = self._backbone.layers, torch.cat([cohort.hidden for cohort in cohorts])
        projected = layers.project(step.projecting(), step.layers, hidden)
        finishing = step.finishing()
        attended = self._backbone.attend(step.layers[0], projected, step.visits, None, None, finishing.rows)
        outputs = torch.cat(list(layers.finish(finishing, step.layers, hidden, attended)))
        hidden = layers.mix(step.left, step.plan, step.own_and_routed(outputs))
        sizes = [int(cohort.lengths_after.sum()) for cohort in cohorts]
        for cohort, piece in zip(cohorts, hidden.split(sizes), strict=True):
            cohort.enter(piece)

    def _members(self, cohort: Cohort) -> Indices:
        numbers = np.array([self._number_of[id(adapter)] for adapter in cohort.forward.adapters])
        return numbers[cohort.packed.members]


def _side_by_side(lengths: Sequence[Indices], members: Sequence[Indices]) -> Packed:
    counts = np.concatenate(lengths)
    past = np.zeros_like(counts)
    return Packed(counts, past, np.concatenate(members), causal=False, device=torch.device("cpu"))


def _one_plan(plans: Sequence[RoutePlan], sizes: Sequence[int]) -> RoutePlan:
    """The plans of cohorts of so many requests as one."""
    first = np.cumsum([0, *sizes[:-1]])
    layers = np.concatenate([plan.layers for plan in plans])
    requests = np.concatenate([plan.requests + start for plan, start in zip(plans, first, strict=True)])
    choices = np.concatenate([plan.choices for plan in plans])
    order = np.lexsort((requests, layers))
    own = [
        torch.ones(size) if plan.own is None else plan.own for plan, size in zip(plans, sizes, strict=True)
    ]
    weights = torch.cat([torch.ones(0) if plan.weights is None else plan.weights for plan in plans])
    at = torch.from_numpy(order)
    return RoutePlan(torch.cat(own), layers[order], requests[order], choices[order], weights[at])
