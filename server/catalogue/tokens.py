"""API keys as callers send them: `molex_ID_SECRET`, of which the catalogue keeps a keyed digest."""

from __future__ import annotations

import hmac
import re
import secrets

SECRET_BYTES = 32
_ID = re.compile(r"[0-9a-f]{16}")
_TOKEN = re.compile(rf"molex_({_ID.pattern})_([A-Za-z0-9_-]{{43}})")


def new_token() -> tuple[str, str]:
    """The id of a new key, and the whole token with its secret of 256 bits."""
    key_id = secrets.token_hex(8)
    return key_id, f"molex_{key_id}_{secrets.token_urlsafe(SECRET_BYTES)}"


def is_key_id(text: str) -> bool:
    """Whether a key may have this id. Not every text is one that a database takes."""
    return _ID.fullmatch(text) is not None


def key_id_of(token: str) -> str | None:
    """The id in a token; None where it is no token of ours."""
    found = _TOKEN.fullmatch(token)
    return found[1] if found else None


def digest(token: str, pepper: str) -> str:
    """HMAC-SHA-256 of the token under the pepper, in hex.

    The secret is random and as long as the digest, so a slow hash would add nothing: it cannot be guessed.
    """
    return hmac.digest(pepper.encode(), token.encode(), "sha256").hex()


def matches(token: str, pepper: str, expected: str) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(digest(token, pepper), expected)
