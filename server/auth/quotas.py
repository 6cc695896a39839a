"""How much a tenant may ask for. Counted in this process: each replica has the whole quota."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import ExitStack

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from server.auth.caller import Caller
from server.errors import ErrorKind, ServiceError

MINUTE = 60


class Quotas:
    """Counts the requests and tokens of each tenant over a sliding minute, and its requests under way."""

    def __init__(self) -> None:
        self._counts = MemoryStorage()
        self._limiter = SlidingWindowCounterRateLimiter(self._counts)
        self._running: Counter[str] = Counter()

    async def begin(self, caller: Caller, ending: ExitStack) -> None:
        """Count a request of a caller, as under way until `ending` closes.

        Raises ServiceError (429) where it is one too many.
        """
        tenant, quota = caller.tenant, caller.quota
        if tenant is None:
            return
        if quota.concurrency is not None and self._running[tenant] >= quota.concurrency:
            message = f"{tenant} has {self._running[tenant]} requests under way, which is its limit"
            raise ServiceError(ErrorKind.QUOTA, message, retry_after=1)
        self._running[tenant] += 1
        ending.callback(self._end, tenant)
        await self._spend("requests", tenant, quota.requests_per_minute, 1)

    def _end(self, tenant: str) -> None:
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]

    async def tokens(self, caller: Caller, count: int) -> None:
        """Spend tokens: of the prompts, and as many as may be generated.

        Raises ServiceError: 429, or 400 where the request needs more than a minute allows.
        """
        limit = caller.quota.tokens_per_minute
        if caller.tenant is None:
            return
        if limit is not None and count > limit:
            message = f"the request may take {count} tokens; {caller.tenant} has {limit} a minute"
            raise ServiceError(ErrorKind.INVALID_REQUEST, message)
        await self._spend("tokens", caller.tenant, limit, count)

    async def _spend(self, what: str, tenant: str, limit: int | None, count: int) -> None:
        if limit is None:
            return
        item = RateLimitItemPerMinute(limit)
        if count > limit or not await self._limiter.hit(item, what, tenant, cost=count):
            window = await self._counts.get_sliding_window(item.key_for(what, tenant), MINUTE)
            wait = max(1, math.ceil(_seconds_until(limit - count, *window)))
            message = f"{tenant} has used its {limit} {what} a minute"
            raise ServiceError(ErrorKind.QUOTA, message, retry_after=wait)


def _seconds_until(
    room: int, previous: int, previous_left: float, current: int, current_left: float
) -> float:
    """How long until no more than `room` is counted, if nothing is added meanwhile.

    What was counted in the minute before, `previous`, fades as the minute passes, of which `previous_left`
    seconds are left; `current` stays until this minute is over and fades in the next, which ends in
    `current_left` seconds.
    """
    if room < 0:
        return MINUTE
    if current <= room:
        return previous_left - MINUTE * (room - current) / max(previous, 1)
    return current_left - MINUTE * room / current
