"""What classification and embedding share: texts that are done when their prompt has run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq
from typing import Self

from fastapi import Request, Response
from pydantic import BaseModel

from server.deps import Target, check_count, spend_tokens, unless_disconnected
from server.engine import Engine
from server.routes.prepare import prepare
from server.routes.timing import Stopwatch
from server.sequence import Sequence, Timings
from server.tokenization import Prompt, TextOrPair, Tokenization

SHORT_CHARACTERS = 256
"""So many take a tenth of a millisecond to tokenize, less than going to another thread and back."""


class PromptUsage(BaseModel):
    """Counts of tokens, special ones included."""

    prompt_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, sequences: Seq[Sequence]) -> Self:
        tokens = sum(len(sequence.token_ids) for sequence in sequences)
        return cls(prompt_tokens=tokens, total_tokens=tokens)


async def run_prompts(
    engine: Engine,
    target: Target,
    inputs: Seq[TextOrPair],
    request: Request,
    response: Response,
    *,
    param: str = "input",
    truncate: bool = False,
    priority: int = 0,
) -> list[Sequence]:
    """Run the texts that a request has in its field `param`; returns the ended sequences in their order.

    Puts the digest of the adapter and the times of the stages into the headers of the response. Raises
    ServiceError.
    """
    watch = Stopwatch(request.state.deadline)
    check_count(engine, len(inputs), param)
    tokenization = target.base.tokenization
    encoding = _encode(engine, watch.deadline, tokenization, inputs, param, truncate=truncate)
    adapter, prompts = await prepare(engine, target, watch, encoding)
    await spend_tokens(request, target.caller, prompts)
    sequences = [
        Sequence(
            base=target.base.name,
            adapter=adapter,
            tenant=target.caller.tenant,
            priority=priority,
            token_ids=prompt.token_ids,
            token_type_ids=prompt.token_type_ids,
            index=index,
            timings=Timings(watch.created),
        )
        for index, prompt in enumerate(prompts)
    ]
    submission = engine.submit(sequences, watch.deadline)
    try:
        await unless_disconnected(request, submission.finished())
    finally:
        submission.cancel()
    response.headers.update(target.headers | watch.record(request, engine, sequences))
    return sequences


async def _encode(
    engine: Engine,
    deadline: float,
    tokenization: Tokenization,
    inputs: Seq[TextOrPair],
    param: str,
    *,
    truncate: bool,
) -> list[Prompt]:
    """Tokenize on a pool thread, but here what is short and stays whole. Raises ServiceError."""
    texts = itertools.chain.from_iterable([text] if isinstance(text, str) else text for text in inputs)
    if not truncate and sum(map(len, texts)) <= SHORT_CHARACTERS:
        # The tokenizer that truncates is made at its first use, which takes too long for the event loop.
        return tokenization.encode(inputs, param)
    return await engine.in_pool(deadline, tokenization.encode, inputs, param, truncate=truncate)
