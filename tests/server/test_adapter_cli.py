"""`molex adapter` against a running server, and without one."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from server.cli import app


@pytest.fixture
def molex(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, ["adapter", *map(str, arguments)])


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
