"""Every error that the service answers with, in one table, and its OpenAI-shaped body."""

from __future__ import annotations

from enum import Enum
from typing import Any


class ErrorKind(Enum):
    """HTTP status, OpenAI `type` and `code` of each kind of error."""

    INVALID_REQUEST = (400, "invalid_request_error", "invalid_value")
    UNSUPPORTED_PARAMETER = (400, "invalid_request_error", "unsupported_parameter")
    EMPTY_INPUT = (400, "invalid_request_error", "empty_input")
    CONTEXT_LENGTH = (400, "invalid_request_error", "context_length_exceeded")
    TOO_MANY_INPUTS = (400, "invalid_request_error", "too_many_inputs")
    WRONG_TASK = (400, "invalid_request_error", "wrong_task")
    ALREADY_LOADED = (400, "invalid_request_error", "already_loaded")
    NO_SOURCE = (400, "invalid_request_error", "source_not_found")
    BAD_ADAPTER = (400, "invalid_request_error", "invalid_adapter")
    NO_KEY = (401, "authentication_error", "missing_api_key")
    BAD_KEY = (401, "authentication_error", "invalid_api_key")
    MISSING_SCOPE = (403, "permission_error", "missing_scope")
    FORBIDDEN_ADAPTER = (403, "permission_error", "forbidden_adapter")
    FORBIDDEN_SOURCE = (403, "permission_error", "forbidden_source")
    NOT_FOUND = (404, "not_found_error", "not_found")
    MODEL_NOT_FOUND = (404, "not_found_error", "model_not_found")
    ADAPTER_NOT_FOUND = (404, "not_found_error", "adapter_not_found")
    TENANT_NOT_FOUND = (404, "not_found_error", "tenant_not_found")
    KEY_NOT_FOUND = (404, "not_found_error", "key_not_found")
    METHOD_NOT_ALLOWED = (405, "invalid_request_error", "method_not_allowed")
    SLOW_BODY = (408, "invalid_request_error", "request_timeout")
    NAME_TAKEN = (409, "conflict_error", "name_taken")
    ADAPTER_UNAVAILABLE = (409, "conflict_error", "adapter_unavailable")
    TOO_MANY_ADAPTERS = (409, "conflict_error", "too_many_adapters")
    TOO_MANY_KEYS = (409, "conflict_error", "too_many_keys")
    LOAD_IN_PROGRESS = (409, "conflict_error", "load_in_progress")
    NO_PREVIOUS_VERSION = (409, "conflict_error", "no_previous_version")
    VERSION_IN_USE = (409, "conflict_error", "version_in_use")
    STORAGE_FULL = (409, "conflict_error", "storage_full")
    ADAPTER_QUOTA = (409, "conflict_error", "adapter_quota_exceeded")
    TOO_LARGE = (413, "invalid_request_error", "request_too_large")
    OVERLOADED = (429, "overloaded_error", "queue_full")
    QUOTA = (429, "rate_limit_error", "quota_exceeded")
    CLIENT_GONE = (499, "invalid_request_error", "client_closed_request")
    INTERNAL = (500, "server_error", "internal_error")
    STOPPING = (503, "server_error", "shutting_down")
    SOURCE_DOWN = (503, "server_error", "source_unavailable")
    STUCK = (503, "server_error", "worker_stuck")
    CATALOGUE_DOWN = (503, "server_error", "catalogue_unavailable")
    DEADLINE = (504, "timeout_error", "deadline_exceeded")

    def __init__(self, status: int, error_type: str, code: str) -> None:
        self.status = status
        self.error_type = error_type
        self.code = code


class ServiceError(Exception):
    """An answer other than success. `param` names the request field at fault; `retry_after` is in seconds."""

    def __init__(
        self,
        kind: ErrorKind,
        message: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.param = param
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.kind.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers

    def body(self) -> dict[str, Any]:
        """The body of the answer, in the shape that OpenAI clients parse."""
        error = {
            "message": self.message,
            "type": self.kind.error_type,
            "param": self.param,
            "code": self.kind.code,
        }
        return {"error": error}


def internal_error() -> ServiceError:
    """What a client is told about a fault of ours: nothing that shows the inside. The log has the rest."""
    return ServiceError(ErrorKind.INTERNAL, "internal error; the server's log has the details")


def adapter_not_found(name: str) -> ServiceError:
    """One answer for an adapter that is missing and for one of another tenant."""
    return ServiceError(ErrorKind.ADAPTER_NOT_FOUND, f"no adapter is named {name!r}", param="name")


def model_not_found(name: str) -> ServiceError:
    message = f"no base or adapter is named {name!r}; GET /v1/models lists them"
    return ServiceError(ErrorKind.MODEL_NOT_FOUND, message, param="model")


def unsupported_parameter(name: str) -> ServiceError:
    return ServiceError(ErrorKind.UNSUPPORTED_PARAMETER, f"unsupported parameter: {name}", param=name)


def stuck_error() -> ServiceError:
    return ServiceError(ErrorKind.STUCK, "the server does not get on with its work", retry_after=5)


def deadline_error() -> ServiceError:
    return ServiceError(ErrorKind.DEADLINE, "the request was not done within its time")


def stopping_error() -> ServiceError:
    return ServiceError(ErrorKind.STOPPING, "the server is shutting down", retry_after=5)


_KIND_OF_STATUS = {
    404: ErrorKind.NOT_FOUND,
    405: ErrorKind.METHOD_NOT_ALLOWED,
    408: ErrorKind.SLOW_BODY,
    413: ErrorKind.TOO_LARGE,
    499: ErrorKind.CLIENT_GONE,
}


def error_of_status(status: int, message: str) -> ServiceError:
    """The error for a status that the HTTP framework chose by itself."""
    fallback = ErrorKind.INTERNAL if status >= 500 else ErrorKind.INVALID_REQUEST
    return ServiceError(_KIND_OF_STATUS.get(status, fallback), message)
