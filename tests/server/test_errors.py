from __future__ import annotations

from server.errors import ErrorKind, ServiceError, error_of_status


def test_every_kind_has_a_status_a_type_and_a_code_of_its_own():
    assert all(400 <= kind.status < 600 for kind in ErrorKind)
    assert len({kind.code for kind in ErrorKind}) == len(ErrorKind)
    assert all(kind.error_type.endswith("_error") for kind in ErrorKind)


def test_the_body_is_openais():
    error = ServiceError(ErrorKind.OVERLOADED, "full", param="x", retry_after=3)
    assert error.body() == {
        "error": {"message": "full", "type": "overloaded_error", "param": "x", "code": "queue_full"}
    }
    assert error.headers == {"retry-after": "3"}


def test_statuses_of_the_framework_have_a_kind():
    kinds = [error_of_status(status, "").kind for status in (404, 405, 413, 415, 502)]
    assert kinds == [
        ErrorKind.NOT_FOUND,
        ErrorKind.METHOD_NOT_ALLOWED,
        ErrorKind.TOO_LARGE,
        ErrorKind.INVALID_REQUEST,
        ErrorKind.INTERNAL,
    ]
