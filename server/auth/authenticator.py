"""From the header of a request to its caller."""

from __future__ import annotations

import logging
import re
import time
from collections import OrderedDict
from collections.abc import Callable

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter

from server.auth.caller import Caller
from server.catalogue import tokens
from server.catalogue.catalogue import Catalogue
from server.catalogue.records import ApiKey, Tenant
from server.errors import ErrorKind, ServiceError

CACHED_KEYS = 4096
RECORDED_REFUSALS = RateLimitItemPerMinute(60)
"""Refused keys that reach the audit log; a flood of them must not fill it."""
_BEARER = re.compile(r"bearer +([^\s]+)", re.IGNORECASE)

log = logging.getLogger(__name__)


class Authenticator:
    """Knows callers by their keys.

    Keys that were used lately are kept in memory, so that a request costs no query and the database may be
    down for a while. A change of a key or tenant in this process drops them at once; of those of other
    processes `Changes` tells within a second.
    """

    def __init__(self, catalogue: Catalogue, clock: Callable[[], float] = time.time) -> None:
        self._catalogue = catalogue
        self._clock = clock
        self._cache: OrderedDict[str, tuple[ApiKey, Tenant]] = OrderedDict()
        self._changes = 0
        self._refusals = FixedWindowRateLimiter(MemoryStorage())
        self._unrecorded = 0

    async def identify(self, authorization: str | None) -> Caller:
        """The caller that an `Authorization` header proves.

        Raises ServiceError: 401, or 503 where the key is not in memory and the database is down.
        """
        if authorization is None:
            message = "an API key is needed: send it as 'Authorization: Bearer KEY'"
            raise ServiceError(ErrorKind.NO_KEY, message)
        found = _BEARER.fullmatch(authorization)
        token = found[1] if found else ""
        key_id = tokens.key_id_of(token)
        known = None if key_id is None else await self._find(key_id)
        if known is None or not self._catalogue.is_secret(token, known[0]):
            raise await self._refused(key_id, "unknown key", "the API key is not valid")
        key, tenant = known
        if (state := key.state(self._clock())) != "live":
            raise await self._refused(key_id, f"{state} key", f"the API key is {state}")
        return Caller(tenant.name, key.id, key.scopes, tenant.quota)

    def forget(self, subject: str) -> None:
        """Drop what changed, `key:ID` or `tenant:NAME`, and let no reading under way bring it back."""
        kind, _, name = subject.partition(":")
        if kind == "key":
            self._cache.pop(name, None)
        elif kind == "tenant":
            theirs = [key.id for key, tenant in self._cache.values() if tenant.name == name]
            for key_id in theirs:
                del self._cache[key_id]
        self._changes += 1

    async def _find(self, key_id: str) -> tuple[ApiKey, Tenant] | None:
        if known := self._cache.get(key_id):
            self._cache.move_to_end(key_id)
            return known
        changes = self._changes
        known = await self._catalogue.find_key(key_id)
        if known is not None and changes == self._changes:
            self._cache[key_id] = known
            if len(self._cache) > CACHED_KEYS:
                self._cache.popitem(last=False)
        return known

    async def _refused(self, key_id: str | None, reason: str, message: str) -> ServiceError:
        """The answer to a bad key, once it is in the audit log; beyond a bound they are counted alone."""
        if await self._refusals.hit(RECORDED_REFUSALS):
            detail = {"reason": reason, "unrecorded_before": self._unrecorded}
            self._unrecorded = 0
            try:
                await self._catalogue.record("server", "login.refused", f"key:{key_id or 'unknown'}", detail)
            except ServiceError:
                log.warning("a refused key is not in the audit log: the catalogue cannot be reached")
        else:
            self._unrecorded += 1
        return ServiceError(ErrorKind.BAD_KEY, message)
