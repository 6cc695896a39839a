"""Bytes of an answer to the value that it stands for."""

from __future__ import annotations

import json
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from molex_client.errors import BadAnswerError

T = TypeVar("T", bound=BaseModel)


def read_json(data: bytes) -> object:
    """Raises BadAnswerError."""
    try:
        content: object = json.loads(data)
    except ValueError as error:
        raise BadAnswerError(f"the answer is no JSON: {error}") from error
    return content


def parse(kind: type[T], content: object) -> T:
    """Raises BadAnswerError, which names the field that is missing or of another type."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, problem["loc"])) or "the answer"
        raise BadAnswerError(f"{where}: {problem['msg']}") from error
