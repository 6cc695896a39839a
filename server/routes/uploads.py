"""The body of `PUT /v1/adapters/{name}`: a source in JSON, or the two files themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.datastructures import FormData, Headers, UploadFile

from molex.adapter_file import CONFIG_NAME, WEIGHTS_NAME, AdapterFiles
from server.errors import ErrorKind, ServiceError
from server.routes.bodies import parse, validate
from server.schemas import PutAdapterRequest, UploadFields

MAX_CONFIG_BYTES = 1_048_576
FILES = (CONFIG_NAME, WEIGHTS_NAME)
FIELDS = tuple(UploadFields.model_fields)
MULTIPART = "multipart/form-data"

DOCUMENTED: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": PutAdapterRequest.model_json_schema()},
            MULTIPART: {
                "schema": {
                    "type": "object",
                    "required": list(FILES),
                    "properties": {
                        **{name: {"type": "string", "format": "binary"} for name in FILES},
                        "base": {"type": "string"},
                        "pinned": {"type": "boolean"},
                    },
                }
            },
        },
    }
}
"""For the OpenAPI document: the handler reads the body itself, once the caller is known to be let in."""


@dataclass(frozen=True)
class Upload:
    """The files of an adapter, and what their sender says of them."""

    files: AdapterFiles
    fields: UploadFields


def brings_files(headers: Headers) -> bool:
    """Whether the body of a request is files, by its media type."""
    media_type = headers.get("content-type", "").partition(";")[0]
    return media_type.strip().lower() == MULTIPART


async def read_put(request: Request, max_bytes: int) -> PutAdapterRequest | Upload:
    """Raises ServiceError or RequestValidationError, which name the field at fault."""
    if brings_files(request.headers):
        return await _read_form(request, max_bytes)
    return parse(PutAdapterRequest, await request.body())


async def _read_form(request: Request, max_bytes: int) -> Upload:
    try:
        async with request.form(max_files=len(FILES), max_fields=len(FIELDS), max_part_size=1024) as form:
            return await _upload(form, max_bytes)
    except ValueError:
        # Starlette lets through that the charset of the form cannot decode it.
        raise ServiceError(ErrorKind.INVALID_REQUEST, f"the body is not valid {MULTIPART}") from None


async def _upload(form: FormData, max_bytes: int) -> Upload:
    parts = form.multi_items()
    for name in {name for name, _ in parts}.difference(FILES, FIELDS):
        raise _refusal(name, f"there is no part of this name, only {', '.join((*FILES, *FIELDS))}")
    if len(dict(parts)) < len(parts):
        raise _refusal("body", "two parts have the same name")
    contents = [await _content(name, dict(parts).get(name), limit) for name, limit in _limits(max_bytes)]
    fields = {name: value for name, value in parts if name in FIELDS}
    return Upload(AdapterFiles(*contents), validate(UploadFields, fields))


def _limits(max_bytes: int) -> tuple[tuple[str, int], ...]:
    return (CONFIG_NAME, MAX_CONFIG_BYTES), (WEIGHTS_NAME, max_bytes)


async def _content(name: str, part: UploadFile | str | None, limit: int) -> bytes:
    if not isinstance(part, UploadFile):
        raise _refusal(name, "missing" if part is None else "send it as a file, with a file name")
    if (part.size or 0) > limit:
        message = f"{name}: has {part.size} bytes; the limit is {limit}"
        raise ServiceError(ErrorKind.TOO_LARGE, message, param=name)
    return await part.read()


def _refusal(name: str, problem: str) -> ServiceError:
    return ServiceError(ErrorKind.INVALID_REQUEST, f"{name}: {problem}", param=name)
