"""Sequences for a scheduler without a model."""

from __future__ import annotations

from dataclasses import dataclass

from server.scheduler import Batch


@dataclass(eq=False)
class Work:
    """A prompt of `length` tokens, followed by `outputs` generated ones; 0 is a classification."""

    length: int
    outputs: int = 0
    base: str = "a"
    tenant: str | None = None
    priority: int = 0
    done: int = 0
    cancelled: bool = False
    pages: int = 1
    in_parts: bool = False
    run: int = 0
    """Tokens of a prompt that runs in parts."""

    @property
    def num_pages(self) -> int:
        return self.pages if self.outputs else 0

    @property
    def num_new_tokens(self) -> int:
        return 1 if self.done else self.length - self.run

    @property
    def is_paused(self) -> bool:
        return 0 < self.run < self.length

    @property
    def finished(self) -> bool:
        return self.done > 0 and self.done >= self.outputs


def run_batch(batch: Batch[Work]) -> int:
    """Do the work of one step; how many tokens that were."""
    *whole, last = batch.sequences
    tokens = batch.part_tokens + sum(
        work.num_new_tokens for work in (whole if batch.part_tokens else batch.sequences)
    )
    last.run += batch.part_tokens
    for work in whole if last.is_paused else batch.sequences:
        work.done += 1
    return tokens
