from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from server.catalogue.tokens import key_id_of
from server.cli import app
from tests.server.conftest import PEPPER


@pytest.fixture
def molex(monkeypatch, tmp_path):
    """Runs a command on a catalogue in SQLite."""
    monkeypatch.setenv("MOLEX_DATABASE", f"sqlite:///{tmp_path}/catalogue.db")
    monkeypatch.setenv("MOLEX_PEPPER", PEPPER)
    return lambda *arguments: CliRunner().invoke(app, [*arguments])


def test_a_key_is_made_listed_and_revoked(molex):
    assert molex("tenant", "set", "acme", "--concurrency", "4").stdout == "acme: concurrency=4\n"
    made = molex("key", "create", "--tenant", "acme", "--scopes", "infer,metrics", "--expires", "30d")
    token = made.stdout.strip()
    key_id = key_id_of(token)
    assert key_id
    assert "not shown again" in made.stderr
    [listed] = map(json.loads, molex("key", "list", "--json").stdout.splitlines())
    assert (listed["id"], listed["tenant"], listed["state"]) == (key_id, "acme", "live")
    assert listed["scopes"] == ["infer", "metrics"]
    assert listed["expires"] - listed["created"] == pytest.approx(30 * 86_400, abs=60)
    assert "digest" not in listed
    assert "revoked" in molex("key", "revoke", key_id).stdout
    assert "revoked" in molex("key", "list", "--tenant", "acme").stdout
    assert token not in molex("audit", "list").stdout


def test_limits_are_lifted_by_word(molex):
    molex("tenant", "set", "acme", "--adapters", "3")
    assert molex("tenant", "set", "acme", "--adapters", "none").stdout == "acme: no limits\n"
    assert json.loads(molex("tenant", "list", "--json").stdout)["quota"]["adapters"] is None


def test_the_audit_log_is_verified_against_an_earlier_head(molex):
    molex("tenant", "set", "acme")
    earlier = molex("audit", "verify").stdout.strip()
    assert earlier.startswith("1:")
    molex("tenant", "set", "other")
    verified = molex("audit", "verify", "--head", earlier)
    assert verified.stdout.startswith("2:")
    actions = [json.loads(line)["action"] for line in molex("audit", "list").stdout.splitlines()]
    assert actions == ["tenant.create", "tenant.create"]
    assert len(molex("audit", "list", "--after", "1").stdout.splitlines()) == 1
    refused = molex("audit", "verify", "--head", "1:" + "0" * 64)
    assert refused.exit_code == 1
    assert "does not contain" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["key", "create", "--tenant", "nobody"], 1, "no tenant is named 'nobody': create it first"),
        (["key", "create", "--tenant", "acme", "--scopes", "root"], 2, "'root'"),
        (["key", "create", "--tenant", "acme", "--expires", "soon"], 2, "'soon'"),
        (["key", "create", "--tenant", "acme", "--expires", "2001-01-01"], 1, "expired already"),
        (["key", "revoke", "0123"], 1, "no key has the id '0123'"),
        (["tenant", "set", "acme", "--concurrency", "many"], 2, "--concurrency"),
        (["tenant", "set", "A/B"], 1, "'A/B' is no name"),
        (["audit", "verify", "--head", "x"], 2, "NUMBER:HASH"),
        (["key", "list", "--database", "mysql://x/y"], 2, "'mysql'"),
    ],
)
def test_what_is_wrong_is_said_in_words(molex, arguments, code, words):
    molex("tenant", "set", "acme")
    result = molex(*arguments)
    assert result.exit_code == code
    assert words in result.stderr
    assert "Traceback" not in result.output


def test_without_a_catalogue_or_a_pepper_nothing_is_done(molex, monkeypatch):
    monkeypatch.delenv("MOLEX_PEPPER")
    result = molex("key", "list")
    assert result.exit_code == 2
    assert "MOLEX_PEPPER" in result.stderr
    monkeypatch.delenv("MOLEX_DATABASE")
    assert "--database" in molex("key", "list").stderr
