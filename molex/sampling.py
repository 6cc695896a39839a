"""Choosing the next token from logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from molex.errors import InputError

FIRST_CANDIDATES = 256
"""Nucleus sampling looks at this many best tokens before it sorts the whole vocabulary."""

GREEDY_BELOW = 1e-5
"""Temperatures below this leave the best token alone with all probability, and logits would overflow."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request samples. Raises InputError naming the field that is out of range.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 keep the whole vocabulary. `logprobs` is the number
    of alternatives reported beside each chosen token; None reports nothing.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 1, "max_tokens", "at least 1", self.max_tokens)
        finite = math.isfinite(self.temperature) and self.temperature >= 0
        _require(finite, "temperature", "finite and at least 0", self.temperature)
        _require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p)
        _require(self.top_k >= 0, "top_k", "at least 0", self.top_k)
        _require(all(self.stop), "stop", "free of empty strings", list(self.stop))
        _require((self.logprobs or 0) >= 0, "logprobs", "at least 0", self.logprobs)


@dataclass(frozen=True)
class SampledToken:
    """A chosen token and, if asked for, the log-probabilities of it and of the best alternatives."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def new_generator(seed: int | None) -> torch.Generator:
    """The random numbers of one request: reproducible with a seed, and never shared with other requests."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


class _Logits:
    """The logits [n, vocab] of several requests, and what is computed for all of them at once."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @cached_property
    def finite(self) -> list[bool]:
        """Whether all logits of each request are finite. Their sum is then, and takes a single pass."""
        precision = torch.promote_types(self.values.dtype, torch.float32)
        return self.values.sum(-1, dtype=precision).isfinite().tolist()

    @cached_property
    def best(self) -> list[int]:
        return self.values.max(-1).indices.tolist()

    @cached_property
    def logprobs(self) -> Tensor:
        return self.values.float().log_softmax(-1)


@dataclass(frozen=True)
class LogitRow:
    """The logits of one request among those of several."""

    logits: _Logits
    row: int

    @property
    def finite(self) -> bool:
        return self.logits.finite[self.row]

    def sample(self, params: SamplingParams, generator: torch.Generator) -> SampledToken:
        """Choose one token.

        Log-probabilities are those of the model, before temperature, top-k and top-p.
        """
        if params.temperature < GREEDY_BELOW:
            token_id = self.logits.best[self.row]
        else:
            scaled = self.logits.values[self.row].float() / params.temperature
            token_id = _draw(scaled, params, generator)
        if params.logprobs is None:
            return SampledToken(token_id)
        logprobs = self.logits.logprobs[self.row]
        best = logprobs.topk(min(params.logprobs, len(logprobs)))
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return SampledToken(token_id, float(logprobs[token_id]), top)


def logit_rows(logits: Sequence[Tensor]) -> list[LogitRow]:
    """Logits [vocab] of several requests, side by side."""
    if not logits:
        return []
    together = _Logits(torch.stack(list(logits)))
    return [LogitRow(together, row) for row in range(len(logits))]


def _draw(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Draw a token id from the candidates that top-k and top-p leave."""
    if params.top_k == 0 and params.top_p == 1:
        return _pick(logits.softmax(-1), generator)
    probs, token_ids = _candidates(logits, params)
    return int(token_ids[_pick(probs, generator)])


def _candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The most likely tokens, best first: probabilities [n], not renormalised, and token ids [n]."""
    vocab = len(logits)
    top_k = min(params.top_k or vocab, vocab)
    # top-p counts probability among the tokens that top-k left.
    total = logits.logsumexp(-1) if top_k == vocab else logits.topk(top_k).values.logsumexp(-1)
    best = logits.topk(min(top_k, FIRST_CANDIDATES))
    probs = (best.values - total).exp()
    if len(probs) < top_k and float(probs.sum()) < params.top_p:
        best = logits.topk(top_k)
        probs = (best.values - total).exp()
    # A token is kept while the tokens before it have not reached top_p; the best one always is.
    keep = probs.cumsum(-1) - probs < params.top_p
    keep[0] = True
    return probs[keep], best.indices[keep]


def _pick(weights: Tensor, generator: torch.Generator) -> int:
    return int(torch.multinomial(weights, 1, generator=generator))


def _require(valid: bool, field: str, rule: str, value: object) -> None:
    if not valid:
        raise InputError(f"{field} must be {rule}, got {value}")
