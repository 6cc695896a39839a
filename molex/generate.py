"""Offline generation over the packed forward and the KV cache.

A short relative of the server's scheduler: prompts enter as slots become free, and every forward
carries the prompts that enter and one token of each running continuation.
"""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from molex.adapter import BARE, Adapter
from molex.errors import InputError
from molex.kv_cache import KVCache, Slot, pages_for
from molex.model import MolexModel
from molex.routing import Route
from molex.row import Row
from molex.sampling import LogitsProcessor, SamplingParams, logit_rows, new_generator, new_processor

GREEDY = SamplingParams(max_tokens=64, temperature=0)


@dataclass
class _Stream:
    """One prompt and its continuation so far."""

    index: int
    prompt: Sequence[int]
    slot: Slot
    random: torch.Generator
    processor: LogitsProcessor | None = None
    route: Route | None = None
    generated: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.generated)

    def row(self, adapter: Adapter) -> Row:
        """What the next forward computes: the prompt, afterwards the newest token."""
        if self.route is None:
            return Row(token_ids=self.prompt, adapter=adapter, slot=self.slot)
        return Row(
            token_ids=self.generated[-1:],
            adapter=adapter,
            slot=self.slot,
            start=self.length - 1,
            route=self.route,
        )


@torch.inference_mode()
def generate(
    model: MolexModel,
    prompts: Sequence[Sequence[int]],
    adapter: Adapter = BARE,
    params: SamplingParams = GREEDY,
    *,
    stop_ids: Collection[int] = (),
    num_slots: int = 16,
) -> list[list[int]]:
    """Continue each prompt, token by token; each is routed once, by its own tokens.

    A continuation ends before a token of `stop_ids`, after `params.max_tokens` tokens or at the
    base's longest sequence. With a seed, every prompt draws from its own generator of that seed.

    Raises:
        InputError: an empty prompt, one that fills the base's longest sequence, or sampling
            parameters that only a server has a use for (`stop`, `logprobs`).
    """
    _check(model, prompts, params)
    if not prompts:
        return []
    longest = min(max(map(len, prompts)) + params.max_tokens, model.spec.max_length)
    streams = adapter.num_streams
    cache = model.new_cache(min(num_slots, len(prompts)) * pages_for(longest, streams))
    stops = frozenset() if params.ignore_eos else frozenset(stop_ids)
    waiting = deque(enumerate(prompts))
    running: list[_Stream] = []
    finished: list[list[int]] = [[] for _ in prompts]
    while waiting or running:
        while waiting and len(running) < num_slots:
            index, prompt = waiting.popleft()
            slot = cache.allocate(longest, streams)
            processor = new_processor(params, prompt, model.spec.vocab_size)
            running.append(_Stream(index, prompt, slot, new_generator(params.seed), processor))
        _step(model, adapter, cache, running, params)
        for stream in [stream for stream in running if _ended(stream, stops, params, longest)]:
            finished[stream.index] = [token for token in stream.generated if token not in stops]
            cache.free(stream.slot)
            running.remove(stream)
    return finished


def _check(model: MolexModel, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
    if params.stop or params.logprobs is not None:
        raise InputError("stop and logprobs are not available in offline generation")
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) < model.spec.max_length:
            raise InputError(
                f"prompt {index} has {len(prompt)} tokens; "
                f"it must have between 1 and {model.spec.max_length - 1}"
            )


def _step(
    model: MolexModel,
    adapter: Adapter,
    cache: KVCache,
    running: Sequence[_Stream],
    params: SamplingParams,
) -> None:
    """Append one token to every running continuation."""
    output = model.run([stream.row(adapter) for stream in running], cache)
    rows = logit_rows(output.logits)
    for stream, route, row in zip(running, output.routes, rows, strict=True):
        stream.route = route
        stream.generated.append(row.sample(params, stream.random, stream.processor).token_id)


def _ended(stream: _Stream, stops: Collection[int], params: SamplingParams, longest: int) -> bool:
    return (
        stream.generated[-1] in stops
        or len(stream.generated) == params.max_tokens
        or stream.length == longest
    )
