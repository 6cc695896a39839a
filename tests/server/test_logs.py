from __future__ import annotations

import json
import logging
import sys

from server.logs import JsonFormatter


def record(**extra) -> logging.LogRecord:
    made = logging.LogRecord("server.access", logging.INFO, "f.py", 1, "%s %r", ("GET", "/a\nb"), None)
    made.__dict__.update(extra)
    return made


def test_a_line_is_one_json_object_with_the_request_fields():
    text = JsonFormatter().format(record(request_id="7", method="GET", path="/a\nb", status=200))
    assert "\n" not in text
    line = json.loads(text)
    assert (line["level"], line["logger"], line["message"]) == ("info", "server.access", r"GET '/a\nb'")
    assert (line["request_id"], line["path"], line["status"]) == ("7", "/a\nb", 200)


def test_an_exception_is_part_of_its_line():
    try:
        raise ValueError("broken")
    except ValueError:
        text = JsonFormatter().format(record(exc_info=sys.exc_info()))
    assert "\n" not in text
    assert "ValueError: broken" in json.loads(text)["exception"]
