"""Whether a request that has failed is sent again, and when."""

from __future__ import annotations

import random
from dataclasses import dataclass

from molex_client.errors import ApiError, ClientError, ConnectionFailedError, TimedOutError

FIRST_PAUSE = 0.5
UNSTARTED = frozenset({429})
"""What the server answers before it has begun with a request."""
PASSING = frozenset({429, 503})
"""What the next attempt may not meet again."""
GATEWAYS = frozenset({502, 504})
"""So too, but from a proxy alone: a server that says 504 itself has spent the time of the request."""


@dataclass(frozen=True)
class Retries:
    """`attempts` more after the first, but none that has to wait for longer than `longest_pause` seconds."""

    attempts: int
    longest_pause: float

    def pause(self, error: ClientError, made: int, *, repeatable: bool) -> float | None:
        """Seconds until the next attempt after `made` of them; None where the error is final.

        `repeatable`: doing it twice is the same as doing it once. Where it is not, only what surely did not
        happen is tried again. A timeout is never: the server may be at work on it, and would get it twice.
        """
        if made > self.attempts or not _worthwhile(error, repeatable=repeatable):
            return None
        asked = error.retry_after if isinstance(error, ApiError) else None
        pause = FIRST_PAUSE * 2 ** (made - 1) * random.uniform(0.5, 1) if asked is None else asked
        return pause if pause <= self.longest_pause else None


def _worthwhile(error: ClientError, *, repeatable: bool) -> bool:
    if isinstance(error, ConnectionFailedError):
        return not error.sent or (repeatable and not isinstance(error, TimedOutError))
    if not isinstance(error, ApiError):
        return False
    if not repeatable:
        return error.status in UNSTARTED
    return error.status in PASSING or (error.status in GATEWAYS and error.code is None)
