"""How vLLM spells errors: on the routes that are its own, not on those that it has from OpenAI."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

from server.errors import ErrorKind, ServiceError
from server.routes.answers import VllmError
from server.routes.errors import error_answers, error_route

TYPES = {400: "BadRequestError", 404: "NotFoundError", 500: "InternalServerError"}
"""Of its errors by status; those that it does not know keep our types."""

FIELDS = {"name": "lora_name", "source": "lora_path", "base": "base_model_name"}
"""Its names of ours."""


def _status(kind: ErrorKind) -> int:
    """vLLM does not find the adapter where there is no folder."""
    return 404 if kind is ErrorKind.NO_SOURCE else kind.status


def _spell(error: ServiceError) -> JSONResponse:
    status = _status(error.kind)
    kind = "InvalidUserInput" if error.kind is ErrorKind.ALREADY_LOADED else TYPES.get(status)
    detail = {
        "message": error.message,
        "type": kind or error.kind.error_type,
        "param": FIELDS.get(error.param or "", error.param),
        "code": status,
    }
    return JSONResponse({"error": detail}, status, headers=error.headers)


VLLM_ERRORS: dict[str, Any] = {
    "route_class": error_route(_spell),
    "responses": error_answers(VllmError, _status),
}
"""What a router of vLLM's routes is made with."""
