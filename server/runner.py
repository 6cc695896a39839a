"""Runs one step of the sequences of one base: tokens to rows, rows through the model, results to updates."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from molex.model import MolexModel, RunStats
from molex.row import Row
from molex.sampling import SampledToken, new_generator, new_processor, sample
from server.detokenizer import TextStream
from server.errors import ServiceError, internal_error
from server.sequence import Sequence, Status, TokenText, Update
from server.tokenization import Tokenization

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepOutput:
    """What one step brought: an update of every sequence in it."""

    updates: list[Update]
    stats: RunStats | None = None


class ModelRunner:
    """Owns the model of one base and its generation slots. Used by the worker thread alone."""

    def __init__(self, model: MolexModel, tokenization: Tokenization, *, max_sequences: int) -> None:
        self._model = model
        self._tokenization = tokenization
        self._cache = (
            model.new_cache(max_sequences, tokenization.max_length) if model.spec.generates else None
        )

    @property
    def cache_bytes(self) -> int:
        """Room for the keys and values of running generations."""
        return 0 if self._cache is None else self._cache.nbytes

    @torch.inference_mode()
    def run(self, sequences: Seq[Sequence]) -> StepOutput:
        """Run one step. Whatever it raises concerns all the sequences; see `fail`."""
        begin = perf_counter()
        rows = [self._row(sequence) for sequence in sequences]
        output = self._model.run(rows, self._cache)
        seconds = perf_counter() - begin
        updates = []
        for sequence, logits, route in zip(sequences, output.logits, output.routes, strict=True):
            sequence.timings.forward += seconds
            sequence.start += sequence.num_new_tokens
            sequence.route = route
            updates.append(self._advance(sequence, logits))
        return StepOutput(updates, output.stats)

    def fail(self, sequences: Seq[Sequence]) -> StepOutput:
        """Answer every sequence of a step that raised."""
        return StepOutput([self._failure(sequence) for sequence in sequences])

    def release(self, sequence: Sequence) -> None:
        """End a sequence and give its slot back."""
        sequence.status = Status.FINISHED
        if sequence.slot is not None and self._cache is not None:
            self._cache.free(sequence.slot)
            sequence.slot = None

    @property
    def num_free_slots(self) -> int:
        return 0 if self._cache is None else self._cache.num_free

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
        sequence.status = Status.RUNNING
        if sequence.sampling is None:
            return
        assert self._cache is not None
        sequence.slot = self._cache.allocate()
        sequence.generator = new_generator(sequence.sampling.seed)
        sequence.processor = new_processor(
            sequence.sampling, sequence.token_ids, self._model.spec.vocab_size, sequence.constraint
        )
        sequence.text_stream = TextStream(
            self._tokenization.decode, sequence.token_ids, sequence.sampling.stop
        )

    def _advance(self, sequence: Sequence, output: Tensor) -> Update:
        """Take a sequence one step on. A fault in its own numbers ends it and leaves the others alone."""
        try:
            if not bool(output.isfinite().all()):
                raise FloatingPointError(f"output of {sequence.adapter.digest or 'the base'} not finite")
            if sequence.sampling is not None:
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

    def _generate(self, sequence: Sequence, logits: Tensor) -> Update:
        params, stream, processor = sequence.sampling, sequence.text_stream, sequence.processor
        assert params is not None
        assert stream is not None
        assert sequence.generator is not None
        sampled = sample(logits, params, sequence.generator, processor)
        sequence.output_ids.append(sampled.token_id)
        token = self._token_text(sampled, stream.length)
        ends = sampled.token_id in self._tokenization.stop_ids and not params.ignore_eos
        text = "" if ends else stream.push(sampled.token_id)
        complete = ends or stream.stopped or (processor is not None and processor.finished)
        if not complete and len(sequence.output_ids) < params.max_tokens:
            return Update(sequence, text, token)
        text += stream.end()
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
