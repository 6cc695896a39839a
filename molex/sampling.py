"""Choosing the next token from logits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

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

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 keep the whole vocabulary. `logprobs` is the
    number of alternatives reported beside each chosen token; None reports nothing. `LogitsProcessor` says
    what the penalties and `logit_bias`, by token id, do.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
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
        _require(0 <= self.min_p <= 1, "min_p", "from 0 to 1", self.min_p)
        for name in ("presence_penalty", "frequency_penalty"):
            _require(math.isfinite(getattr(self, name)), name, "finite", getattr(self, name))
        # Beyond this range logits would leave that of float32.
        in_range = 0.01 <= self.repetition_penalty <= 100
        _require(in_range, "repetition_penalty", "from 0.01 to 100", self.repetition_penalty)
        finite = all(map(math.isfinite, self.logit_bias.values()))
        _require(finite, "logit_bias", "finite", dict(self.logit_bias))
        _require(all(self.stop), "stop", "free of empty strings", list(self.stop))
        _require((self.logprobs or 0) >= 0, "logprobs", "at least 0", self.logprobs)


class Constraint(Protocol):
    """Decides which tokens a text may go on with."""

    def allowed(self) -> Tensor:
        """bool [vocab], true for at least one token."""

    def accept(self, token_id: int) -> None:
        """Take note of a generated token, which was allowed."""

    @property
    def finished(self) -> bool:
        """Whether nothing can follow."""


class LogitsProcessor:
    """Changes the logits of one request before a token is chosen, by what it has generated so far.

    z' = r(z) + logit_bias − frequency_penalty · c − presence_penalty · [c > 0], where c counts how often each
    token was generated. r divides positive logits of the tokens in prompt and output by repetition_penalty
    and multiplies their negative ones by it. Tokens that the constraint does not allow get −∞.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        vocab_size: int,
        constraint: Constraint | None = None,
    ) -> None:
        biased = list(params.logit_bias)
        valid = all(0 <= token_id < vocab_size for token_id in biased)
        _require(valid, "logit_bias", f"of tokens 0 to {vocab_size - 1}", biased)
        self._params = params
        self._constraint = constraint
        self._generated: set[int] = set()
        # All that is added to logits is one vector, which each token changes in one place.
        self._added = torch.zeros(vocab_size)
        self._added[biased] = torch.tensor(list(params.logit_bias.values()))
        self._seen = torch.zeros(vocab_size, dtype=torch.bool)
        self._seen[list(prompt_ids)] = True

    def process(self, logits: Tensor) -> Tensor:
        """The changed logits [vocab]."""
        if (penalty := self._params.repetition_penalty) != 1:
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self._seen, penalised, logits)
        logits = logits + self._added
        if self._constraint is not None:
            logits = logits.masked_fill(~self._constraint.allowed(), -math.inf)
        return logits

    @property
    def finished(self) -> bool:
        """Whether the constraint lets nothing follow."""
        return self._constraint is not None and self._constraint.finished

    def accept(self, token_id: int) -> None:
        """Take note of a generated token."""
        if self._constraint is not None:
            self._constraint.accept(token_id)
        self._added[token_id] -= self._params.frequency_penalty
        if token_id not in self._generated:
            self._added[token_id] -= self._params.presence_penalty
        self._generated.add(token_id)
        self._seen[token_id] = True


def new_processor(
    params: SamplingParams,
    prompt_ids: Sequence[int],
    vocab_size: int,
    constraint: Constraint | None = None,
) -> LogitsProcessor | None:
    """The processor of one request; None where nothing changes its logits.

    Raises InputError where `logit_bias` names a token outside the vocabulary.
    """
    penalised = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
    if not (penalised or params.logit_bias or constraint is not None):
        return None
    return LogitsProcessor(params, prompt_ids, vocab_size, constraint)


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
        if self.values.device.type == "cpu":
            # NumPy compares many values of float32 at a time, PyTorch one of bfloat16 after the other.
            return self.values.float().numpy().argmax(-1).tolist()  # type: ignore[no-any-return]
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

    def sample(
        self,
        params: SamplingParams,
        generator: torch.Generator,
        processor: LogitsProcessor | None = None,
    ) -> SampledToken:
        """Choose one token from the logits, which `processor` changes first.

        Log-probabilities are those of the model, before all that parameters change.
        """
        if processor is None and params.temperature < GREEDY_BELOW:
            token_id = self.logits.best[self.row]
        else:
            # What a request adds to logits, and its random numbers, are on the host.
            logits = self.logits.values[self.row].float().cpu()
            token_id = _choose(logits if processor is None else processor.process(logits), params, generator)
        if processor is not None:
            processor.accept(token_id)
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


def _choose(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """The best token, or one drawn from those that min-p, top-k and top-p leave."""
    if params.temperature < GREEDY_BELOW:
        return int(logits.argmax())
    logits = logits / params.temperature
    if params.min_p > 0:
        logits = logits.masked_fill(logits < logits.max() + math.log(params.min_p), -math.inf)
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
