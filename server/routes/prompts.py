"""What classification and embedding share: texts that are done when their prompt has run."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Self

from fastapi import Request, Response
from pydantic import BaseModel

from server.deps import Target, check_count, spend_tokens, unless_disconnected
from server.engine import Engine
from server.routes.prepare import prepare
from server.routes.timing import Stopwatch
from server.sequence import Sequence, Timings
from server.tokenization import TextOrPair


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
    encode = target.base.tokenization.encode
    adapter, prompts = await prepare(engine, target, watch, encode, inputs, param, truncate=truncate)
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
