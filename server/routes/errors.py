"""Every failure as an answer in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from collections.abc import Sequence as Seq
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from server.errors import ErrorKind, ServiceError, error_of_status, unsupported_parameter


def install(app: FastAPI) -> None:
    """Register the handlers."""
    app.add_exception_handler(ServiceError, _on_service_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_error)


def error_answers(
    model: type[BaseModel], status_of: Callable[[ErrorKind], int] = lambda kind: kind.status
) -> dict[int | str, dict[str, Any]]:
    """How the OpenAPI document shows errors of the shape `model`."""
    statuses = sorted(set(map(status_of, ErrorKind)))
    answers: dict[int | str, dict[str, Any]] = {}
    for first in "45":
        listed = ", ".join(str(status) for status in statuses if str(status).startswith(first))
        answers[f"{first}XX"] = {"model": model, "description": f"One of {listed}"}
    return answers


def text_answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """How the OpenAPI document shows answers in plain text, of routes whose errors are JSON."""
    return {status: {"content": {"text/plain": {"schema": {"type": "string"}}}} for status in statuses}


def answer(error: ServiceError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse(error.body(), error.kind.status, headers={**error.headers, **(headers or {})})


def error_route(spell: Callable[[ServiceError], Response]) -> type[APIRoute]:
    """A class of routes that answer errors in a shape of their own."""

    class ErrorRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_in_shape(request: Request) -> Response:
                try:
                    return await handle(request)
                except ServiceError as error:
                    return spell(error)
                except RequestValidationError as error:
                    return spell(describe(error))
                except HTTPException as error:
                    response = spell(error_of_status(error.status_code, error.detail))
                    response.headers.update(error.headers or {})
                    return response

            return handle_in_shape

    return ErrorRoute


async def _on_service_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    return answer(error)


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    """What the framework refused by itself: unknown paths and methods, bodies that are too large."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path}"
    return answer(error_of_status(error.status_code, message), error.headers)


async def _on_invalid_request(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return answer(describe(error))


def describe(error: RequestValidationError) -> ServiceError:
    """The most telling problem of an invalid request, in words."""
    return _describe(_best(error.errors()))


def _best(problems: Seq[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The most telling problem of the first field that has one.

    A field of several types has a problem for each: the one inside the type that was meant says most.
    """
    of_field = [problem for problem in problems if problem["loc"][:2] == problems[0]["loc"][:2]]
    return max(of_field, key=lambda p: (not p["type"].endswith("_type"), len(p["loc"])))


def _path(location: Seq[str | int]) -> list[str]:
    """Field names and indices; pydantic's names of the types that it tried are left out."""
    if location[0] == "header":
        return [str(location[1])]
    names = [str(part) for part in location[1:] if isinstance(part, int) or part.isidentifier()]
    return [name for name in names if name not in ("str", "int", "float", "bool")]


def _describe(problem: Mapping[str, Any]) -> ServiceError:
    """One validation problem in words. The offending value itself is never repeated."""
    path = _path(problem["loc"])
    param = path[0] if path else None
    if problem["type"] == "json_invalid":
        message = f"the body is not valid JSON: {problem['ctx']['error']}"
        return ServiceError(ErrorKind.INVALID_REQUEST, message)
    if problem["type"] == "model_attributes_type" and not path:
        message = "the body is not a JSON object, or its content-type is not application/json"
        return ServiceError(ErrorKind.INVALID_REQUEST, message)
    if problem["type"] == "extra_forbidden":
        return unsupported_parameter(".".join(path))
    where = ".".join(path) or "body"
    return ServiceError(
        ErrorKind.INVALID_REQUEST, f"{where}: {problem['msg'].removeprefix('Value error, ')}", param=param
    )
