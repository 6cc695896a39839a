from __future__ import annotations

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.catalogue.tokens import digest, key_id_of, matches, new_token


def test_tokens_are_new_each_time_and_carry_256_bits():
    made = {new_token() for _ in range(100)}
    assert len({token for _, token in made}) == 100
    for key_id, token in made:
        assert key_id_of(token) == key_id
        assert len(token.removeprefix(f"molex_{key_id}_")) * 6 >= 256


def test_the_digest_is_hmac_sha_256_under_the_pepper():
    assert digest("t", "p") == hmac.new(b"p", b"t", hashlib.sha256).hexdigest()
    assert matches("t", "p", digest("t", "p"))
    assert not matches("t", "other", digest("t", "p"))


def test_secrets_are_compared_in_constant_time(monkeypatch):
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda *pair: compared.append(pair) or False)
    assert not matches("t", "p", digest("t", "p"))
    assert compared == [(digest("t", "p"),) * 2]


@pytest.mark.parametrize("change", [str.upper, lambda t: t + "x", lambda t: t[:-1], lambda t: " " + t])
def test_a_changed_token_is_no_token(change):
    assert key_id_of(change(new_token()[1])) is None


@given(st.text())
def test_any_text_is_taken_without_failing(text):
    assert key_id_of(text) is None
