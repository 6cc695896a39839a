"""Bodies that handlers read themselves, refused as FastAPI refuses those that it reads."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from server.errors import ErrorKind, ServiceError
from server.schemas import Body

B = TypeVar("B", bound=Body)


def parse(kind: type[B], text: bytes) -> B:
    """A body in JSON, whatever its content type. Raises ServiceError or RequestValidationError."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise ServiceError(ErrorKind.INVALID_REQUEST, "the body is not valid JSON") from None
    return validate(kind, content)


def validate(kind: type[B], content: Any) -> B:
    """Raises RequestValidationError, which names the field at fault."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        problems = [problem | {"loc": ("body", *problem["loc"])} for problem in error.errors()]
        raise RequestValidationError(problems) from None
