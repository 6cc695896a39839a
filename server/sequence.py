"""One piece of work, from admission to its last token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from time import perf_counter

import torch

from molex.adapter import Adapter
from molex.kv_cache import Slot, pages_for
from molex.passes import Pass
from molex.routing import Route
from molex.sampling import Constraint, LogitsProcessor, SamplingParams
from server.detokenizer import TextStream
from server.errors import ServiceError


class Status(Enum):
    """Where a sequence is on its way."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(frozen=True)
class TokenText:
    """A generated token as text, with log-probabilities where they were asked for."""

    text: str
    offset: int
    """Characters of generated text before this token."""
    logprob: float | None = None
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Update:
    """News of a sequence: some text, its end, or its failure."""

    sequence: Sequence
    text: str = ""
    token: TokenText | None = None
    finish_reason: str | None = None
    error: ServiceError | None = None

    @property
    def last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass
class Timings:
    """When things happened, on the clock of `time.perf_counter`, in seconds; durations in seconds."""

    created: float = field(default_factory=perf_counter)
    queued: float = 0.0
    started: float = 0.0
    last_token: float = 0.0
    forward: float = 0.0
    """Sum over the steps that this sequence took part in."""

    @property
    def queue(self) -> float:
        return max(0.0, self.started - self.queued)


@dataclass(eq=False)
class Sequence:
    """A prompt on its way through the engine. Classifications and embeddings end after it.

    The adapter is captured at admission: a sequence finishes on the weights it started with.
    """

    base: str
    adapter: Adapter
    token_ids: list[int]
    tenant: str | None = None
    priority: int = 0
    """Lower is earlier, among the sequences of its tenant that wait."""
    in_parts: bool = False
    """Whether its prompt runs some depths a step, beside others that come meanwhile."""
    sampling: SamplingParams | None = None
    constraint: Constraint | None = None
    token_type_ids: list[int] | None = None
    index: int = 0
    """Its place among the inputs of its request."""
    sink: Callable[[Update], None] = field(default=lambda _: None, repr=False)
    """Where its updates go; called on the event loop."""
    timings: Timings = field(default_factory=Timings)

    status: Status = Status.WAITING
    cancelled: bool = False
    slot: Slot | None = None
    start: int = 0
    """How many of its tokens are in the cache."""
    num_reused: int = 0
    """How many of them were there before it began."""
    paused: Pass | None = None
    """Its first forward pass, where that runs in parts and has not ended."""
    route: Route | None = None
    output_ids: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    """Logits of a classification; `probs` are made from them, or of a regression are the same."""
    probs: list[float] = field(default_factory=list)
    embedding: list[float] = field(default_factory=list)
    text_stream: TextStream | None = None
    generator: torch.Generator | None = None
    processor: LogitsProcessor | None = None

    @property
    def new_token_ids(self) -> list[int]:
        """The tokens that are not in the cache yet."""
        return self.output_ids[-1:] if self.output_ids else self.token_ids[self.start :]

    @property
    def num_new_tokens(self) -> int:
        if self.paused is not None:
            return self.paused.tokens_left
        return 1 if self.output_ids else len(self.token_ids)

    @property
    def is_paused(self) -> bool:
        return self.paused is not None

    @property
    def num_pages(self) -> int:
        if self.sampling is None:
            return 0
        return pages_for(len(self.token_ids) + self.sampling.max_tokens, self.adapter.num_streams)

    @property
    def label(self) -> str:
        """The most probable class of a classification."""
        best = max(range(len(self.probs)), key=self.probs.__getitem__)
        return self.adapter.id2label[best]

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED
