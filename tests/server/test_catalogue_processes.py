"""Processes that share a catalogue: a server, a writer, and the commands in the process of the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from server.cli import app
from tests.server.conftest import PEPPER
from tests.server.processes import started, stopped

WRITER = """
import asyncio, sys
from server.catalogue.catalogue import Catalogue
from server.catalogue.records import Scope
from server.catalogue.url import parse_url

async def main():
    catalogue = Catalogue(parse_url(sys.argv[1]), sys.argv[2])
    for number in range(100_000):
        await catalogue.create_key("acme", frozenset(Scope), actor="writer", name=f"{sys.argv[3]}-{number}")
        print(number, flush=True)

asyncio.run(main())
"""


@pytest.fixture
def environment(url: sa.URL) -> dict[str, str]:
    database = url.render_as_string(hide_password=False)
    added = {"MOLEX_DATABASE": database, "MOLEX_PEPPER": PEPPER, "OMP_NUM_THREADS": "1"}
    return {**os.environ, **added}


@pytest.fixture
def molex(environment) -> Callable[..., str]:
    """Runs a command and gives what it prints."""

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, [*arguments], env=environment)
        assert result.exit_code == 0, result.output
        return result.stdout.strip()

    return run


@contextmanager
def serving(environment: dict[str, str], *options: str) -> Iterator[tuple[str, str]]:
    """The URLs of the first and the second listener of a server."""
    with started(environment, "--admin-port", "0", *options) as (child, urls):
        yield urls[0], urls[-1]
        assert "Traceback" not in stopped(child)


def test_a_key_of_one_process_opens_another_until_it_is_revoked(environment, molex, bases):
    molex("tenant", "set", "acme")
    token = molex("key", "create", "--tenant", "acme", "--scopes", "infer,metrics")
    headers = {"authorization": f"Bearer {token}"}
    with serving(environment, "--base", f"dec={bases['dec']}") as (url, admin_url):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200
        assert httpx.get(f"{url}/metrics", headers=headers).status_code == 404
        assert httpx.get(f"{admin_url}/metrics", headers=headers).status_code == 200
        molex("key", "revoke", token.split("_")[1])
        # The server looks once a second; each attempt here takes a round trip.
        answers = (httpx.get(f"{url}/v1/models", headers=headers).status_code for _ in range(20_000))
        assert 401 in answers
    actions = [json.loads(line)["action"] for line in molex("audit", "list").splitlines()]
    assert actions[:3] == ["tenant.create", "key.create", "key.revoke"]
    assert set(actions[3:]) <= {"login.refused"}
    molex("audit", "verify")


def test_a_writer_that_is_killed_leaves_a_sound_catalogue(environment, molex, url):
    molex("tenant", "set", "acme")
    for attempt in ("first", "second", "third"):
        command = [sys.executable, "-c", WRITER, environment["MOLEX_DATABASE"], PEPPER, attempt]
        writer = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        for _ in range(7):
            assert writer.stdout.readline()
        writer.kill()
        writer.communicate()
        number, _ = molex("audit", "verify").split(":")
        entries = [json.loads(line) for line in molex("audit", "list").splitlines()]
        assert len(entries) == int(number)
        made = {entry["subject"] for entry in entries if entry["action"] == "key.create"}
        listed = [json.loads(line)["id"] for line in molex("key", "list", "--json").splitlines()]
        assert made == {f"key:{key_id}" for key_id in listed}
