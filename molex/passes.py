"""A forward pass from its rows to its results, which may stop between two depths and go on later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from molex.depths import Depths, NativeDepths, PlannedDepths
from molex.forward import Forward
from molex.grouped_depths import GroupedDepths
from molex.routing import Route


@dataclass(frozen=True)
class RunStats:
    """What one forward pass was made of; `distinct_layers` counts routed layers, summed over depths."""

    tokens: int
    distinct_adapters: int
    distinct_layers: int


@dataclass(frozen=True)
class RunOutput:
    """The results of a forward pass, in the order of its rows.

    `logits[i]` is [num_labels] for a classification adapter, [vocab] or [tokens, vocab] for a causal language
    model, and the last hidden states [tokens, d] for the bare encoder. `balance_loss` is the load-balance
    loss averaged over the votes of the pass, 0 where none was held or no gradient is taken.
    """

    logits: list[Tensor]
    routes: list[Route]
    balance_loss: Tensor
    stats: RunStats


def joined(outputs: Sequence[RunOutput], places: Sequence[int], distinct_adapters: int) -> RunOutput:
    """One output of passes that ran one after the other, whose rows belong at `places`."""
    logits = dict(zip(places, (values for o in outputs for values in o.logits), strict=True))
    routes = dict(zip(places, (route for o in outputs for route in o.routes), strict=True))
    stats = RunStats(
        sum(output.stats.tokens for output in outputs),
        distinct_adapters,
        sum(output.stats.distinct_layers for output in outputs),
    )
    order = range(len(places))
    return RunOutput([logits[i] for i in order], [routes[i] for i in order], outputs[0].balance_loss, stats)


def uncounted() -> None:
    """For callers that do not count depths."""


class Pass:
    """All rows of a `Forward` go through the depths together, so where it stops changes no result.

    Stopping between depths and not between tokens is exact for every row: a vote needs all tokens of a prompt
    at a depth, and so does the attention of an encoder.
    """

    def __init__(self, forward: Forward, lm_logits: Literal["last", "all"]) -> None:
        voters = [len(row.token_ids) if row.voters is None else row.voters for row in forward.rows]
        self._forward = forward
        self._lm_logits: Literal["last", "all"] = lm_logits
        self._hidden = forward.embed()
        ways = [way for way in (NativeDepths, GroupedDepths) if way.can_run(forward)]
        self._depths: Depths = (ways[0] if ways else PlannedDepths)(forward, voters)
        self._num_depths = forward.backbone.num_layers
        self._depth = 0

    @property
    def depths_left(self) -> int:
        return self._num_depths - self._depth

    @property
    def tokens_left(self) -> int:
        """The work that is left, in tokens that run through all depths."""
        return -(-self._forward.packed.num_tokens * self.depths_left // self._num_depths)

    def depths_within(self, tokens: int) -> int:
        """As many of the depths left as are the work of so many tokens through all depths, at least one."""
        return min(self.depths_left, max(1, tokens * self._num_depths // self._forward.packed.num_tokens))

    def advance(self, depths: int, on_depths: Callable[[], None] = uncounted) -> None:
        """Run through the next `depths` depths; `on_depths` is called after each, or after some at once."""
        end = self._depth + depths
        while self._depth < end:
            together = min(self._depths.depths_together, end - self._depth)
            self._hidden = self._depths.run(self._hidden, self._depth, together)
            self._depth += together
            on_depths()

    def output(self) -> RunOutput:
        """The results, once all depths have run."""
        forward, depths = self._forward, self._depths
        logits, routes = forward.logits(self._hidden, self._lm_logits), depths.routes
        losses = list(depths.balance_losses)
        inverse = sorted(range(len(forward.rows)), key=forward.order.__getitem__)
        return RunOutput(
            [logits[i] for i in inverse],
            [routes[i] for i in inverse],
            torch.stack(losses).mean() if losses else torch.zeros((), device=forward.backbone.device),
            RunStats(forward.packed.num_tokens, len(forward.adapters), depths.distinct_layers),
        )
