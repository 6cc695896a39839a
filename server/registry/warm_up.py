"""A first pass with new weights, before anybody is served with them."""

from __future__ import annotations

import asyncio

from molex.adapter import Adapter
from server.engine import Engine
from server.errors import ErrorKind, ServiceError
from server.sequence import Sequence

TEXT = "A short text."
TOKENS = 2
"""Its first so many run: more use no other weights, and take longer; one leaves attention no choice."""
FIRST = -(2**31) - 1
"""A priority before all that a request may have."""


async def warm_up(engine: Engine, base: str, adapter: Adapter, tenant: str | None) -> None:
    """Run the first tokens of a text through an adapter on the worker, the first of what waits of its tenant.

    It runs some depths a step, and leaves every other step to the requests that are there: these wait for few
    of them. A full queue does not refuse it: there are no more warm-ups than loads at a time.

    Raises ServiceError: 400 where that fails or gives a number that is not finite, else what the engine says.
    """
    deadline = asyncio.get_running_loop().time() + engine.settings.max_request_seconds
    encode = engine.bases[base].tokenization.encode
    [prompt] = await engine.in_pool(deadline, encode, [TEXT], "text", truncate=True)
    types = prompt.token_type_ids
    sequence = Sequence(
        base,
        adapter,
        prompt.token_ids[:TOKENS],
        tenant,
        priority=FIRST,
        in_parts=True,
        token_type_ids=None if types is None else types[:TOKENS],
    )
    submission = engine.submit([sequence], deadline, beyond_limit=True)
    try:
        await submission.finished()
    except ServiceError as error:
        if error.kind is not ErrorKind.INTERNAL or not engine.ready:
            raise
        message = "the warm-up failed: a short text gives no answer of finite numbers with these weights"
        raise ServiceError(ErrorKind.BAD_ADAPTER, message) from error
    finally:
        submission.cancel()
