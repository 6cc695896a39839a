"""What can go wrong with a call.

ClientError                  every error of this package
├── ConnectionFailedError    the server was not reached, or the connection broke
│   └── TimedOutError        it was silent for longer than the client's timeout
├── BadAnswerError           it answered with what no molex-serve sends
├── AdapterFailedError       an adapter that was waited for did not become ready
└── ApiError                 it refused, and says why
    ├── InvalidRequestError      a field or a body is at fault (400, 413, other 4xx)
    ├── AuthenticationError      no API key, or a bad one (401)
    ├── PermissionDeniedError    the key may not do this (403)
    ├── NotFoundError            no such base, adapter or route (404)
    ├── ConflictError            the adapter or the tenant is in no state for this (409)
    ├── OverloadedError          too busy, or a quota is used up: later (429)
    └── ServerError              a fault of the server (5xx)
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx


class ClientError(Exception):
    """Every error of this package."""


class ConnectionFailedError(ClientError):
    """The server was not reached, or the connection broke. `sent`: whether it may have got the request."""

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class TimedOutError(ConnectionFailedError):
    """The server was silent for longer than the client's timeout."""


class BadAnswerError(ClientError):
    """The server answered with what no molex-serve sends; something else may listen there."""


class AdapterFailedError(ClientError):
    """An adapter that was waited for did not become ready."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"adapter {name!r} {problem}")
        self.name = name


class ApiError(ClientError):
    """The server refused a request, and says why.

    `code` is its word for the kind of error, `param` the field at fault, `request_id` how its log names the
    request. `status` is None for an error inside a stream. `retry_after` is in seconds.
    """

    status: int | None = None
    request_id: str | None = None
    retry_after: float | None = None

    def __init__(self, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param

    def __str__(self) -> str:
        known = (self.status, self.code, self.request_id and f"request {self.request_id}")
        where = ", ".join(str(part) for part in known if part)
        return f"{self.message} ({where})" if where else self.message


class InvalidRequestError(ApiError):
    """A field or a body is at fault."""


class AuthenticationError(ApiError):
    """No API key, or a bad one."""


class PermissionDeniedError(ApiError):
    """The key may not do this."""


class NotFoundError(ApiError):
    """No such base, adapter or route, or none that this key may see."""


class ConflictError(ApiError):
    """The adapter or the tenant is in no state for this."""


class OverloadedError(ApiError):
    """The server is too busy, or a quota is used up: later."""


class ServerError(ApiError):
    """A fault of the server."""


_BY_STATUS: Mapping[int, type[ApiError]] = {
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    429: OverloadedError,
}
_BY_TYPE: Mapping[str, type[ApiError]] = {
    "authentication_error": AuthenticationError,
    "permission_error": PermissionDeniedError,
    "not_found_error": NotFoundError,
    "conflict_error": ConflictError,
    "overloaded_error": OverloadedError,
    "rate_limit_error": OverloadedError,
    "server_error": ServerError,
    "timeout_error": ServerError,
}
_WORDS = ("message", "type", "code", "param")


def refusal(response: httpx.Response) -> ApiError:
    """The error of a response that is no success and has been read, whoever on the way has written it."""
    status = response.status_code
    kind = _BY_STATUS.get(status, ServerError if status >= 500 else InvalidRequestError)
    error = _spelled(
        kind, _words(response), f"the server answered {status} {response.reason_phrase}".rstrip()
    )
    error.status = status
    error.request_id = response.headers.get("x-request-id")
    error.retry_after = _seconds(response.headers.get("retry-after"))
    return error


def refusal_in_stream(error: object, request_id: str | None) -> ApiError:
    """The error of an event; its HTTP status was that of a success."""
    words = _strings(error)
    kind = _BY_TYPE.get(words.get("type", ""), InvalidRequestError)
    spelled = _spelled(kind, words, "the server ended the stream with an error")
    spelled.request_id = request_id
    return spelled


def failure(error: httpx.HTTPError) -> ConnectionFailedError:
    """What httpx has raised, in this package's words. Headers, and so the API key, are not repeated."""
    unsent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
    kind = TimedOutError if isinstance(error, httpx.TimeoutException) else ConnectionFailedError
    what = "no answer in time" if kind is TimedOutError else "the connection failed"
    detail = f": {error}" if str(error) else ""
    where = f"{error.request.method} {error.request.url}"
    told = kind(f"{where}: {what} ({type(error).__name__}{detail})", sent=not unsent)
    told.__cause__ = error
    return told


def _spelled(kind: type[ApiError], words: Mapping[str, str], otherwise: str) -> ApiError:
    message = words.get("message") or otherwise
    return kind(message, words.get("code"), words.get("param"))


def _words(response: httpx.Response) -> dict[str, str]:
    try:
        body = response.json()
    except ValueError:
        return {}
    return _strings(body.get("error")) if isinstance(body, dict) else {}


def _strings(error: object) -> dict[str, str]:
    given: dict[str, Any] = error if isinstance(error, dict) else {}
    return {name: given[name] for name in _WORDS if isinstance(given.get(name), str)}


def _seconds(retry_after: str | None) -> float | None:
    """Of a Retry-After header, which holds seconds or a date."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(0.0, (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
