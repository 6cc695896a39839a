"""`molex adapter` against a running server, and without one."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from molex_client import Adapter, Client
from server.cli import app


@pytest.fixture
def molex(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, ["adapter", *map(str, arguments)])


@pytest.fixture
def served(molex, live):
    """Runs a command on a running server."""
    return lambda *arguments: molex(*arguments, "--url", live.url)


def test_an_adapter_goes_through_its_life(served, adapters_folder):
    pushed = served("push", adapters_folder / "mood", "--name", "life", "--base", "enc")
    assert pushed.exit_code == 0, pushed.output
    header, row = pushed.stdout.splitlines()
    assert header.split() == ["name", "version", "state", "base", "kind", "task", "size", "aliases"]
    assert row.split()[:6] == ["life", "1", "ready", "enc", "molex", "SEQ_CLS"]
    second = json.loads(served("push", adapters_folder / "topic", "--name", "life", "--json").stdout)
    assert (second["version"], second["kind"]) == (2, "lora")
    assert served("rollback", "life").stdout.splitlines()[1].split()[1] == "1"
    assert served("rollback", "life", "2").stdout.splitlines()[1].split()[1] == "2"
    assert served("rm", "life", "--version", "1").exit_code == 0
    shown = served("show", "life").stdout
    assert second["digest"] in shown
    assert "upload" in shown
    names = {json.loads(line)["name"] for line in served("list", "--json").stdout.splitlines()}
    assert {"life", "mood"} <= names
    assert "life" in served("list").stdout
    assert served("rm", "life").output == ""
    assert "life" not in served("list").stdout


def test_an_alias_follows_what_it_is_told(served, adapters_folder):
    for folder in ("mood", "topic"):
        served("push", adapters_folder / folder, "--name", "aliased", "--base", "enc")
    told = served("alias", "aliased", "prod", "1")
    assert told.exit_code == 0, told.output
    assert told.stdout.splitlines()[1].split()[-1] == "prod=1"
    copied = json.loads(served("alias", "aliased", "best", "prod", "--json").stdout)
    moved = json.loads(served("alias", "aliased", "prod", "2", "--json").stdout)
    assert (copied["aliases"], moved["aliases"]) == ({"prod": 1, "best": 1}, {"prod": 2, "best": 1})
    assert served("rollback", "aliased", "best").stdout.splitlines()[1].split()[1] == "1"
    assert served("unalias", "aliased", "prod").output == ""
    assert json.loads(served("show", "aliased", "--json").stdout)["aliases"] == {"best": 1}
    served("rm", "aliased")


def test_a_name_is_the_folders_unless_it_is_given(served, adapters_folder, tmp_path):
    folder = shutil.copytree(adapters_folder / "topic", tmp_path / "by-folder")
    assert json.loads(served("push", folder, "--json").stdout)["name"] == "by-folder"
    served("rm", "by-folder")


def test_a_push_that_fails_says_why(served, adapters_folder, tmp_path):
    folder = shutil.copytree(adapters_folder / "mood", tmp_path / "spoilt")
    (folder / "adapter_model.safetensors").write_bytes(b"not weights")
    failed = served("push", folder, "--base", "enc")
    assert failed.exit_code == 1
    assert failed.stderr.startswith("error: adapter_model.safetensors: not a safetensors file")
    assert "(400, invalid_adapter, request " in failed.stderr
    shown = served("show", "spoilt").stdout
    assert "spoilt failed to load: adapter_model.safetensors: not a safetensors file" in shown
    served("rm", "spoilt")


def test_a_push_that_is_not_ready_in_time_says_so(served, adapters_folder, monkeypatch):
    card = json.loads(served("show", "topic", "--json").stdout)
    loading = Adapter.model_validate(card | {"state": "loading"})
    monkeypatch.setattr(Client, "push_adapter", lambda *args, **options: loading)
    late = served("push", adapters_folder / "topic", "--wait", "1")
    assert late.exit_code == 1
    assert late.stderr == "error: topic is loading after 1 seconds\n"
    assert served("push", adapters_folder / "topic", "--wait", "0").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "nobody"], "no adapter is named 'nobody'"),
        (["rm", "nobody"], "no adapter is named 'nobody'"),
        (["rollback", "mood"], "mood"),
        (["alias", "nobody", "prod", "1"], "no adapter is named 'nobody'"),
        (["alias", "mood", "prod", "7"], "no adapter is named 'mood@7'"),
        (["alias", "mood", "7", "1"], "alias"),
        (["unalias", "mood", "prod"], "mood"),
        (["rm", "../keys"], "is no name"),
        (["push", "/no/folder"], "/no/folder/adapter_config.json"),
    ],
)
def test_what_cannot_be_done_ends_in_one_line(served, arguments, words):
    result = served(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_good_folder_is_told_to_be_one(molex, bases, adapters_folder):
    plain = molex("validate", adapters_folder / "mood", "--base", bases["enc"])
    assert plain.exit_code == 0, plain.output
    assert f"{adapters_folder}/mood: a molex adapter for SEQ_CLS, sha256:" in plain.stdout
    found = json.loads(molex("validate", adapters_folder / "topic", "--base", bases["enc"], "--json").stdout)
    assert (found["valid"], found["kind"], found["task"]) == (True, "lora", "SEQ_CLS")


@pytest.mark.parametrize(
    ("spoil", "subject"),
    [
        (lambda config: config.update(use_dora=True), "use_dora"),
        (
            lambda config: config.update(r=3),
            "base_model.model.roberta.encoder.layer.0.attention.self.query.lora_A.weight",
        ),
        (lambda config: config["vote"].update(rule="loudest"), "vote.rule"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(molex, bases, adapters_folder, tmp_path, spoil, subject):
    folder = shutil.copytree(adapters_folder / "mood", tmp_path / "mood")
    config = json.loads((folder / "adapter_config.json").read_text())
    spoil(config)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    result = molex("validate", folder, "--base", bases["enc"], "--json")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {subject}: ")
    assert json.loads(result.stdout)["subject"] == subject


@pytest.mark.parametrize(
    ("folder", "base", "words"),
    [
        ("none", "enc", "adapter_config.json: cannot be read (No such file or directory)"),
        ("mood", "none", "no such folder"),
        ("writer", "enc", "task_type: CAUSAL_LM needs a decoder"),
    ],
)
def test_a_folder_or_a_base_that_is_not_there_is_named(molex, bases, adapters_folder, folder, base, words):
    result = molex("validate", adapters_folder / folder, "--base", bases.get(base, "/none"))
    assert result.exit_code == 1
    assert words in result.stderr


def test_a_server_that_is_not_there_is_named(molex):
    result = molex("list", "--url", "http://127.0.0.1:9")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: GET http://127.0.0.1:9/v1/adapters: the connection failed")


@pytest.mark.parametrize("arguments", [["--url", "localhost:8000"], ["--key", "two words"]])
def test_what_cannot_be_sent_is_refused_as_an_option(molex, arguments):
    result = molex("list", *arguments)
    assert result.exit_code == 2
    assert "two words" not in result.output
