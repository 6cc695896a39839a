"""Runs one step of the sequences of one base: tokens to rows, rows through the model, results to updates."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from molex.kv_cache import PAGE_TOKENS, KVCache
from molex.model import MolexModel
from molex.passes import RunOutput, RunStats
from molex.prefix import page_keys
from molex.row import Row
from molex.sampling import (
    LogitRow,
    SampledToken,
    SamplingParams,
    logit_rows,
    new_generator,
    new_processor,
)
from server.detokenizer import TextStream
from server.errors import ServiceError, internal_error
from server.sequence import Sequence, Status, TokenText, Update
from server.tokenization import Tokenization

MAX_SPLITS = 32
"""How often a step halves what has failed: enough to find two faulty sequences, or adapters, among 256."""

Results = tuple[RunOutput, list[Tensor | LogitRow]]
"""Of a pass, and what each of its sequences goes on with."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepOutput:
    """What one step brought: an update of every sequence whose pass has ended, and what the passes were."""

    updates: list[Update]
    stats: list[RunStats] = field(default_factory=list)


class ModelRunner:
    """Owns the model of one base and its key-value cache. Used by the worker thread alone."""

    def __init__(
        self, model: MolexModel, tokenization: Tokenization, *, cache_tokens: int, reuse_prefixes: bool
    ) -> None:
        self._model = model
        self._tokenization = tokenization
        self._reuses = reuse_prefixes
        self._cache = model.new_cache(cache_tokens // PAGE_TOKENS) if model.spec.generates else None
        self.progress = 0
        """Grows with every depth that runs and every sequence that is taken on: who looks sees it work."""

    @property
    def num_pages(self) -> int:
        """Of the key-value cache."""
        return 0 if self._cache is None else self._cache.num_pages

    @property
    def num_free_pages(self) -> int:
        return 0 if self._cache is None else self._cache.num_free

    @property
    def num_kept_pages(self) -> int:
        """Those among the free pages whose keys and values may be of use once more."""
        return 0 if self._cache is None else self._cache.num_unused

    @property
    def cache_bytes(self) -> int:
        """Of the pages that keys and values have been written to."""
        return 0 if self._cache is None else self._cache.nbytes

    @torch.inference_mode()
    def run(self, sequences: Seq[Sequence], part_tokens: int = 0) -> StepOutput:
        """Run one step, as in `Batch`. Whatever it raises concerns all the sequences; see `fail`."""
        step = StepOutput([])
        whole = sequences[:-1] if part_tokens else sequences
        if whole:
            self._run_whole(step, whole)
        if part_tokens:
            self._run_part(step, sequences[-1], part_tokens)
        return step

    def _run_whole(self, step: StepOutput, sequences: Seq[Sequence]) -> None:
        """One pass of all the sequences. Where it raises, its halves run, so that a faulty one fails alone.

        All parts of a size run before their own halves: where an adapter is at fault, all of its sequences
        are, and the others have their answers before it has used up the halvings. A pass changes nothing of a
        sequence before all of it has run, but the pages of its new tokens: those are written again, with the
        same values, before they are read.
        """
        left, splits = deque([sequences]), 0
        while left:
            some = left.popleft()
            begin = perf_counter()
            try:
                results = self._forward(some)
            except Exception as error:
                if len(some) == 1 or splits == MAX_SPLITS:
                    log.exception("a pass of %d sequences failed", len(some))
                    step.updates.extend(self.fail(some).updates)
                    continue
                log.warning("a pass of %d sequences failed, its halves run: %r", len(some), error)
                splits += 1
                left += _halves(some)
            else:
                self._end_pass(step, some, *results, perf_counter() - begin)

    def _forward(self, sequences: Seq[Sequence]) -> Results:
        rows = [self._row(sequence) for sequence in sequences]
        output = self._model.run(rows, self._cache, on_depths=self._progressed)
        return output, _side_by_side(sequences, output.logits)

    def _progressed(self) -> None:
        self.progress += 1

    def _end_pass(
        self,
        step: StepOutput,
        sequences: Seq[Sequence],
        output: RunOutput,
        outputs: Seq[Tensor | LogitRow],
        seconds: float,
    ) -> None:
        step.stats.append(output.stats)
        for sequence, logits, route in zip(sequences, outputs, output.routes, strict=True):
            sequence.timings.forward += seconds
            sequence.start += len(sequence.new_token_ids)
            sequence.route = route
            step.updates.append(self._advance(sequence, logits))
            self._progressed()

    def _run_part(self, step: StepOutput, sequence: Sequence, tokens: int) -> None:
        """Run a long prompt through some more depths. What it raises concerns nobody else."""
        begin = perf_counter()
        try:
            running = sequence.paused or self._model.begin([self._row(sequence)], self._cache)
            running.advance(running.depths_within(tokens), self._progressed)
            sequence.paused = running if running.depths_left else None
            results = None
            if not running.depths_left:
                output = running.output()
                results = output, _side_by_side([sequence], output.logits)
        except Exception:
            log.exception("a prompt that runs in parts failed")
            step.updates.append(self._failure(sequence))
            return
        if results is None:
            sequence.timings.forward += perf_counter() - begin
        else:
            self._end_pass(step, [sequence], *results, perf_counter() - begin)

    def fail(self, sequences: Seq[Sequence]) -> StepOutput:
        """Answer every sequence of a step that raised."""
        return StepOutput([self._failure(sequence) for sequence in sequences])

    def release(self, sequence: Sequence) -> None:
        """End a sequence and give its pages back."""
        sequence.status, sequence.paused = Status.FINISHED, None
        if sequence.slot is not None and self._cache is not None:
            self._cache.free(sequence.slot)
            sequence.slot = None

    def _row(self, sequence: Sequence) -> Row:
        if sequence.status is Status.WAITING:
            self._begin(sequence)
        return Row(
            sequence.new_token_ids,
            adapter=sequence.adapter,
            token_type_ids=sequence.token_type_ids,
            slot=sequence.slot,
            start=sequence.start,
            route=sequence.route,
        )

    def _begin(self, sequence: Sequence) -> None:
        """Get a sequence ready to run. Where that raises nothing has happened, and it can be tried again."""
        if sequence.sampling is not None:
            self._begin_generation(sequence, sequence.sampling)
        sequence.status = Status.RUNNING

    def _begin_generation(self, sequence: Sequence, sampling: SamplingParams) -> None:
        assert self._cache is not None
        sequence.generator = new_generator(sampling.seed)
        sequence.processor = new_processor(
            sampling, sequence.token_ids, self._model.spec.vocab_size, sequence.constraint
        )
        sequence.text_stream = TextStream(self._tokenization.decode, sequence.token_ids, sampling.stop)
        self._take_pages(sequence, self._cache, sampling.max_tokens)

    def _take_pages(self, sequence: Sequence, cache: KVCache, max_tokens: int) -> None:
        prompt = sequence.token_ids
        # The last token has to run: what follows it is asked for.
        keys = self._keys(sequence, prompt[:-1])
        slot = cache.allocate(len(prompt) + max_tokens, sequence.adapter.num_streams, keys)
        sequence.slot, sequence.route = slot, slot.route
        sequence.start = sequence.num_reused = slot.num_reused

    def _keys(self, sequence: Sequence, tokens: Seq[int]) -> list[bytes]:
        if not self._reuses:
            return []
        return page_keys(sequence.adapter, sequence.token_ids, tokens, owner=sequence.tenant or "")

    def _keep_pages(self, sequence: Sequence, tokens: Seq[int]) -> None:
        """Offer the pages of some first tokens of a sequence to those to come."""
        assert self._cache is not None
        assert sequence.slot is not None
        self._cache.keep(sequence.slot, self._keys(sequence, tokens), sequence.route or ())

    def _advance(self, sequence: Sequence, output: Tensor | LogitRow) -> Update:
        """Take a sequence one step on. A fault in its own numbers ends it and leaves the others alone."""
        try:
            if not (output.finite if isinstance(output, LogitRow) else bool(output.isfinite().all())):
                raise FloatingPointError(f"output of {sequence.adapter.digest or 'the base'} not finite")
            if isinstance(output, LogitRow):
                return self._generate(sequence, output)
            if sequence.adapter.head is not None:
                return self._classify(sequence, output)
            return self._embed(sequence, output)
        except ServiceError as error:
            return self._failure(sequence, error)
        except Exception:
            log.exception("a sequence failed after the forward pass")
            return self._failure(sequence)

    def _classify(self, sequence: Sequence, logits: Tensor) -> Update:
        scores = logits.float()
        if sequence.adapter.regression:
            probs = scores
        else:
            # One label is a yes/no score of its own; several are exclusive.
            probs = scores.sigmoid() if len(scores) == 1 else scores.softmax(-1)
        sequence.scores, sequence.probs = scores.tolist(), probs.tolist()
        self.release(sequence)
        return Update(sequence, finish_reason="stop")

    def _embed(self, sequence: Sequence, hidden: Tensor) -> Update:
        """Mean of the last hidden states [tokens, d]."""
        sequence.embedding = hidden.float().mean(0).tolist()
        self.release(sequence)
        return Update(sequence, finish_reason="stop")

    def _generate(self, sequence: Sequence, logits: LogitRow) -> Update:
        params, stream, processor = sequence.sampling, sequence.text_stream, sequence.processor
        assert params is not None
        assert stream is not None
        assert sequence.generator is not None
        sampled = logits.sample(params, sequence.generator, processor)
        if not sequence.output_ids:
            self._keep_pages(sequence, sequence.token_ids)
        sequence.output_ids.append(sampled.token_id)
        token = self._token_text(sampled, stream.length)
        ends = sampled.token_id in self._tokenization.stop_ids and not params.ignore_eos
        text = "" if ends else stream.push(sampled.token_id)
        complete = ends or stream.stopped or (processor is not None and processor.finished)
        if not complete and len(sequence.output_ids) < params.max_tokens:
            return Update(sequence, text, token)
        text += stream.end()
        if sequence.adapter.molex is None:
            # The prompt of the next turn of a conversation; routed, it would hold a vote of its own.
            self._keep_pages(sequence, [*sequence.token_ids, *sequence.output_ids[:-1]])
        self.release(sequence)
        return Update(sequence, text, token, "stop" if complete else "length")

    def _token_text(self, sampled: SampledToken, offset: int) -> TokenText | None:
        """The token as text, where log-probabilities were asked for."""
        if sampled.logprob is None:
            return None
        decode = self._tokenization.token_text
        top = tuple((decode(token_id), logprob) for token_id, logprob in sampled.top)
        return TokenText(decode(sampled.token_id), offset, sampled.logprob, top)

    def _failure(self, sequence: Sequence, error: ServiceError | None = None) -> Update:
        self.release(sequence)
        return Update(sequence, error=error or internal_error())


def _halves(sequences: Seq[Sequence]) -> tuple[list[Sequence], list[Sequence]]:
    """Half of the adapters with all their sequences, and the rest; of one adapter, half of the sequences."""
    adapters = list(dict.fromkeys(sequence.adapter for sequence in sequences))
    if len(adapters) == 1:
        middle = len(sequences) // 2
        return list(sequences[:middle]), list(sequences[middle:])
    first = adapters[: len(adapters) // 2]
    halves: tuple[list[Sequence], list[Sequence]] = ([], [])
    for sequence in sequences:
        halves[sequence.adapter not in first].append(sequence)
    return halves


def _side_by_side(sequences: Seq[Sequence], outputs: Seq[Tensor]) -> list[Tensor | LogitRow]:
    """The outputs of a pass, those that a token is chosen from together."""
    generates = [sequence.sampling is not None for sequence in sequences]
    rows = iter(logit_rows([output for output, mine in zip(outputs, generates, strict=True) if mine]))
    return [next(rows) if mine else output for output, mine in zip(outputs, generates, strict=True)]
