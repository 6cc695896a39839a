"""`molex doctor` finds what `molex serve` would trip over."""

from __future__ import annotations

import socket

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from molex.export import export
from server.catalogue.database import migrate
from server.catalogue.url import parse_url
from server.cli import app
from server.doctor import checks
from tests.server.conftest import PEPPER


@pytest.fixture
def doctor(bases, monkeypatch):
    """Runs the command on the tiny encoder, with the measuring left out."""
    monkeypatch.setattr("server.doctor.rates.measured_rates", lambda: {"fp32": 1.0, "bf16": 1.0})

    def run(*options: str, base: bool = True):
        named = ["--base", f"enc={bases['enc']}"] if base else []
        return CliRunner().invoke(app, ["doctor", "--port", "0", *named, *options])

    return run


def lines(result) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in result.stdout.splitlines())


def test_a_machine_that_would_serve_is_told_so(doctor, adapters_folder):
    result = doctor("--adapters", str(adapters_folder))
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("molex serve would work with these options\n")
    told = lines(result)
    assert told["catalogue"] == "none: callers need no keys"
    assert told["listener"] == "127.0.0.1 port of its choice is free"
    assert told["base"].startswith("enc: roberta, 5 layers, ")
    assert "runs on " in told["base"]
    # Those for the decoder are refused, as at a start, and the rest is served.
    assert told["adapters"].startswith(f"3 can be served from {adapters_folder}; judge is refused: ")
    assert len(result.stdout.splitlines()) < 24


def test_without_a_base_the_machine_is_still_described(doctor, monkeypatch, tmp_path):
    (tmp_path / "some-base").mkdir()
    (tmp_path / "some-base" / "config.json").touch()
    monkeypatch.setattr(checks, "DEMO_BASES", tmp_path)
    result = doctor(base=False)
    assert result.exit_code == 1
    assert "problem: settings: at least one base is needed" in result.stderr
    assert lines(result)["models"] == f"found {tmp_path}/some-base"
    assert "cpu" in lines(result)


def test_a_port_that_is_taken_is_named(doctor):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = doctor("--admin-port", port)
    assert result.exit_code == 1
    assert result.stderr == f"problem: port {port} on 127.0.0.1: Address already in use\n"


def test_a_base_that_cannot_be_loaded_is_named_and_the_others_are_tried(doctor):
    result = doctor("--base", "other=/no/such/folder")
    assert result.exit_code == 1
    assert "problem: base other: base model '/no/such/folder': no such folder" in result.stderr
    assert "enc: roberta" in result.stdout


def test_weights_that_cannot_fit_are_not_loaded(doctor, monkeypatch, bases):
    assert checks.stored_weights(bases["enc"]) > 10_000
    monkeypatch.setattr(checks, "available_memory", lambda: 4 * checks.stored_weights(bases["enc"]) - 1)
    result = doctor()
    assert result.exit_code == 1
    assert "problem: base enc: its weights take 0.0 GiB" in result.stderr
    assert doctor("--precision", "bf16").exit_code == 0


def test_graphs_count_as_weights_of_an_exported_base_alone(doctor, monkeypatch, bases, tmp_path):
    export(bases["enc"], tmp_path / "exported", "int8")
    stored = 4 * checks.stored_weights(tmp_path / "exported")
    monkeypatch.setattr(checks, "available_memory", lambda: stored)
    options = ["--base", f"a={tmp_path / 'exported'}", "--precision", "auto"]
    assert "problem: base a: its weights take" in doctor(*options, base=False).stderr
    # A folder from a hub may hold graphs that nobody loads.
    (tmp_path / "exported" / "molex_export.json").unlink()
    assert "its weights take" not in doctor(*options, base=False).stderr


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"MOLEX_DATABASE": "sqlite:///c.db"}, "a catalogue needs a pepper: set MOLEX_PEPPER"),
        (
            {"MOLEX_DATABASE": "sqlite:////no/folder/c.db", "MOLEX_PEPPER": PEPPER},
            "there is no folder /no/folder",
        ),
        (
            {"MOLEX_DATABASE": "postgresql://u:hunter2@127.0.0.1:1/d", "MOLEX_PEPPER": PEPPER},
            "postgresql://u:***@127.0.0.1:1/d: the catalogue cannot be opened",
        ),
    ],
)
def test_a_catalogue_that_cannot_be_used_is_named(doctor, monkeypatch, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = doctor()
    assert result.exit_code == 1
    assert words in result.stderr
    assert "hunter2" not in result.output
    assert PEPPER not in result.output


def test_a_storage_that_cannot_be_written_to_is_named(doctor, tmp_path):
    good = doctor("--storage", str(tmp_path / "deep" / "storage"))
    assert good.exit_code == 0
    assert lines(good)["storage"].endswith("GiB free, to be made")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    bad = doctor("--storage", str(tmp_path / "file" / "storage"))
    assert bad.exit_code == 1
    assert f"storage: {tmp_path}/file is no folder that can be written to" in bad.stderr


def test_the_catalogue_is_looked_at_and_left_as_it_is(doctor, monkeypatch, tmp_path):
    database = tmp_path / "catalogue.db"
    monkeypatch.setenv("MOLEX_DATABASE", f"sqlite:///{database}")
    monkeypatch.setenv("MOLEX_PEPPER", PEPPER)
    assert lines(doctor())["catalogue"] == f"sqlite:///{database}, to be made"
    assert not database.exists()
    database.touch()
    assert "at nothing; `molex serve` brings it to 0" in lines(doctor())["catalogue"]
    assert database.stat().st_size == 0
    migrate(parse_url(f"sqlite:///{database}"))
    assert lines(doctor())["catalogue"].endswith("its tables are those of this version")
    engine = sa.create_engine(f"sqlite:///{database}")
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = 'future'"))
    engine.dispose()
    result = doctor()
    assert result.exit_code == 1
    assert "made by a newer version" in result.stderr
