"""Which databases can hold a catalogue."""

from __future__ import annotations

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

__all__ = ["URL", "parse_url"]

KINDS = {"sqlite": "sqlite", "postgresql": "postgresql", "postgres": "postgresql"}


def parse_url(text: str) -> URL:
    """A URL of SQLite or PostgreSQL without a driver. Raises ValueError."""
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ValueError("it is no database URL: use sqlite:///FILE or postgresql://USER@HOST/NAME") from None
    if url.drivername not in KINDS:
        raise ValueError(f"databases of kind {url.drivername!r} are not supported: use sqlite or postgresql")
    if url.drivername == "sqlite" and url.database in (None, "", ":memory:"):
        raise ValueError("a catalogue in memory would be lost: name a file, sqlite:///FILE")
    return url.set(drivername=KINDS[url.drivername])
