"""`molex serve` as a process."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from threading import Event
from time import monotonic

import httpx
import pytest
from typer.testing import CliRunner

from server.auth.access import Access
from server.cli import Server, app
from server.settings import Settings
from tests.server.processes import started, stopped

COMMAND = [sys.executable, "-c", "from server.cli import app; app()"]


@contextmanager
def serving(bases, adapters_folder):
    """A served decoder, begun by the command; the output up to the last line of its greeting, and its URL."""
    options = ["--base", f"dec={bases['dec']}", "--adapters", str(adapters_folder), "--log-format", "json"]
    options += ["--admin-port", "0"]
    child = subprocess.Popen(
        [*COMMAND, "serve", "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert child.stdout is not None
    greeting = ""
    while "/metrics" not in greeting:
        line = child.stdout.readline()
        assert line, child.communicate()
        greeting += line
    url = re.search(r"http://127.0.0.1:\d+", greeting)
    assert url
    try:
        yield child, greeting, url[0]
    finally:
        child.kill()
        child.communicate()


@pytest.fixture
def process(bases, adapters_folder):
    with serving(bases, adapters_folder) as child:
        yield child


def test_it_greets_with_commands_that_work_and_stops_gracefully(process):
    child, greeting, url = process
    assert "dec: llama, 5 layers" in greeting
    assert "writer: molex CAUSAL_LM on dec" in greeting
    assert "mood: REFUSED" in greeting
    for path, data in re.findall(rf"{url}(/v1/\S+) -H 'content-type: application/json' -d '(.*)'", greeting):
        assert httpx.post(url + path, json=json.loads(data)).status_code == 200
    body = {"model": "writer", "prompt": "w1", "max_tokens": 90, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        child.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    output, errors = child.communicate(timeout=60)
    assert child.returncode == 0
    assert "HTTP/1.1" not in output + errors  # uvicorn's own lines
    logged = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    access = [line for line in logged if line["logger"] == "server.access"]
    assert access[-1]["path"] == "/v1/completions"
    assert access[-1]["status"] == 200
    assert "Traceback" not in errors


def test_it_stops_at_once_when_idle_although_clients_keep_their_connections(bases):
    # Whoever waited for the clients, or for the grace to be over, would be killed here.
    options = ["--base", f"dec={bases['dec']}", "--grace-seconds", "600", "--max-client-seconds", "600"]
    with started(os.environ, *options) as (child, [url, *_]), httpx.Client(base_url=url) as client:
        assert client.get("/readyz").status_code == 200
        stopped(child)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_makes_it_unready_at_once(start, settings, number):
    live = start(settings)
    server = Server(live.engine, Access(), {})
    assert live.http.get("/readyz").status_code == 200
    server.handle_exit(number, None)
    assert live.http.get("/readyz").status_code == 503
    assert live.classify(model="mood", input="w1").status_code == 503
    assert server.should_exit


def test_while_requests_finish_others_are_told_to_go_elsewhere(start, settings, threads, brake, monkeypatch):
    live = start(settings)
    held, stopping, shutdown = brake(live, "enc"), Event(), live.server.shutdown

    async def announced(sockets=None):
        stopping.set()
        await shutdown(sockets)

    monkeypatch.setattr(live.server, "shutdown", announced)
    begun = threads.submit(live.classify, model="mood", input="w1")
    held.until(lambda: len(held.batches) == 1)
    live.server.handle_exit(signal.SIGTERM, None)
    assert stopping.wait(60)
    # On a connection that was there and on new ones.
    for ask in (live.http.request, httpx.request):
        for method, path, body in (
            ("GET", "/readyz", None),
            ("POST", "/v1/classify", {"model": "mood", "input": "w1"}),
            ("PUT", "/v1/adapters/x", {"source": "mood"}),
        ):
            refused = ask(method, live.url + path, json=body)
            assert refused.status_code == 503
            assert path == "/readyz" or refused.headers["retry-after"] == "5"
    held.release()
    assert begun.result().status_code == 200


@pytest.mark.faults
def test_an_idle_server_ends_within_three_seconds(bases, adapters_folder):
    seconds = []
    for _ in range(3):
        with serving(bases, adapters_folder) as (child, _, _):
            begin = monotonic()
            child.send_signal(signal.SIGTERM)
            assert child.wait(60) == 0
            seconds.append(monotonic() - begin)
    assert min(seconds) < 3


def test_what_is_not_done_within_the_grace_is_cut_off(bases):
    body = {
        "model": "dec",
        "prompt": "w1",
        "max_tokens": 90,
        "ignore_eos": True,
        "n": 128,
        "stream": True,
    }
    with (
        started(os.environ, "--base", f"dec={bases['dec']}", "--grace-seconds", "0") as (child, [url, *_]),
        httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream,
    ):
        assert stream.status_code == 200
        lines = stream.iter_lines()
        next(lines)
        child.terminate()
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
        assert child.ended()[0] == 0


def test_a_port_in_use_ends_the_process(bases, monkeypatch):
    monkeypatch.setattr("server.logs.configure", lambda settings: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["serve", "--base", f"dec={bases['dec']}", "--port", port])
    assert result.exit_code != 0


def test_every_setting_is_an_option():
    result = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert "pepper" not in result.output
    for name in Settings.model_fields.keys() - {"pepper"}:
        flag = {"bases": "--base", "sources": "--source"}.get(name, "--" + name.replace("_", "-"))
        assert flag in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "at least one base is needed"),
        (["--base", "x=/no/such/folder"], 1, "/no/such/folder"),
        (["--base", "a=/x", "--port", "99999"], 2, "port"),
        (["--base", "a=/x", "--precision", "int3"], 2, "int3"),
        (["--colour", "red"], 2, "--colour"),
    ],
)
def test_bad_options_are_refused_in_one_line(arguments, code, words, monkeypatch):
    monkeypatch.setattr("server.logs.configure", lambda settings: None)
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == code
    assert words in result.output
    assert "Traceback" not in result.output


def test_the_other_commands_are_there():
    result = CliRunner().invoke(app, ["--help"])
    for command in (
        "serve",
        "train",
        "evaluate",
        "convert",
        "merge",
        "config",
        "doctor",
        "adapter",
        "tenant",
        "key",
        "audit",
    ):
        assert command in result.output


def test_the_configuration_is_shown_without_secrets(monkeypatch):
    monkeypatch.setenv("MOLEX_PEPPER", "pepper" * 6)
    monkeypatch.setenv("MOLEX_DATABASE", "postgresql://u:hunter2@h/d?password=hunter3")
    result = CliRunner().invoke(app, ["config", "show", "--base", "a=/x", "--port", "9000"])
    lines = result.stdout.splitlines()
    assert len(lines) == len(Settings.model_fields)
    assert "port = 9000" in lines
    assert "host = 127.0.0.1  (default)" in lines
    assert "database = postgresql://u:***@h/d" in lines
    assert "pepper = **********" in lines
    assert not {"pepperpepper", "hunter2", "hunter3"} & set(re.findall(r"\w+", result.output))


def test_merge_says_what_it_wrote_and_what_is_wrong(bases, adapters_folder, tmp_path):
    options = ["merge", "--base", str(bases["enc"]), "--base-out", str(tmp_path / "merged")]
    options += ["--output", str(tmp_path / "head"), "--adapter"]
    refused = CliRunner().invoke(app, [*options, str(adapters_folder / "mood")])
    assert refused.exit_code == 1
    assert "error: a MoLEx adapter cannot be merged" in refused.output
    result = CliRunner().invoke(app, [*options, str(adapters_folder / "topic")])
    assert result.exit_code == 0
    assert "merged: base written" in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"merged", "head"}


def test_export_says_what_it_wrote_and_what_is_wrong(bases, tmp_path):
    options = ["export", str(bases["enc"]), str(tmp_path / "out"), "--precision", "int8"]
    refused = CliRunner().invoke(app, [*options, "--routed-precision", "fp32"])
    assert refused.exit_code == 1
    assert "error: routed layers cannot be in fp32" in refused.output
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0
    assert f"serve it with --base NAME={tmp_path / 'out'} --precision auto" in result.output
    assert CliRunner().invoke(app, [*options[:-1], "int3"]).exit_code == 2


def test_a_folder_that_cannot_be_converted_is_named(tmp_path):
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "none"), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "error:" in result.output
