from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from server.settings import Settings


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("MOLEX_BASES", raising=False)


def test_bases_are_named_or_take_the_last_part_of_their_path():
    settings = Settings(bases=["small=/models/e5", "org/roberta-base"])
    assert settings.bases == {"small": "/models/e5", "roberta-base": "org/roberta-base"}


def test_settings_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("MOLEX_BASES", "a=/x,b=/y")
    monkeypatch.setenv("MOLEX_PORT", "9000")
    settings = Settings()
    assert settings.bases == {"a": "/x", "b": "/y"}
    assert settings.port == 9000


def test_arguments_win_over_the_environment(monkeypatch):
    monkeypatch.setenv("MOLEX_PORT", "9000")
    assert Settings(bases=["a=/x"], port=1).port == 1


def test_callers_may_load_from_the_adapters_folder_unless_told_otherwise():
    adapters, root = Path("/a"), Path("/b")
    assert Settings(bases=["a=/x"]).http_root is None
    assert Settings(bases=["a=/x"], adapters=adapters).http_root == adapters
    assert Settings(bases=["a=/x"], adapters=adapters, adapter_root=root).http_root == root


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "at least one base"),
        ({"bases": ["a=/x", "a=/y"]}, "two bases are named 'a'"),
        ({"bases": ["a b=/x"]}, "no name for a base"),
        ({"bases": ["a="]}, "has no folder"),
        ({"bases": ["a=/x"], "precision": "float16"}, "precision"),
        ({"bases": ["a=/x"], "device": "gpu"}, "'gpu' is no device: use cpu, cuda or cuda:1"),
        ({"bases": ["a=/x"], "device": "cuda", "precision": "int8"}, "8 or 4 bits need device cpu"),
        ({"bases": ["a=/x"], "device": "cuda:1", "routed_precision": "int4"}, "8 or 4 bits need device cpu"),
        ({"bases": ["a=/x"], "max_queue": 10}, "max_inputs must not exceed max_queue"),
        ({"bases": ["a=/x"], "max_batch_tokens": 8}, "max_sequences must not exceed max_batch_tokens"),
        ({"bases": ["a=/x"], "colour": "red"}, "colour"),
    ],
)
def test_bad_settings_are_refused_by_name(arguments, message):
    with pytest.raises(ValidationError, match=message):
        Settings(**arguments)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_beyond_this_machine_keys_are_needed_or_a_word(host):
    with pytest.raises(ValidationError, match="--insecure"):
        Settings(bases=["a=/x"], host=host)
    with pytest.raises(ValidationError, match="--insecure"):
        Settings(bases=["a=/x"], admin_host=host, admin_port=9000)
    assert Settings(bases=["a=/x"], host=host, insecure=True).host == host
    assert Settings(bases=["a=/x"], host=host, database="sqlite:///c.db", pepper="p" * 32).host == host


def test_both_listeners_are_on_this_machine_unless_told_otherwise():
    settings = Settings(bases=["a=/x"])
    assert settings.host == settings.admin_host == "127.0.0.1"


@pytest.mark.parametrize(
    ("arguments", "admin_port"),
    [
        ({}, None),
        ({"admin_port": 9000}, 9000),
        ({"port": 0, "admin_port": 0}, 0),
        ({"host": "0.0.0.0"}, 8001),
        ({"host": "0.0.0.0", "port": 0}, 0),
        ({"host": "0.0.0.0", "port": 65_535}, 0),
        ({"host": "0.0.0.0", "admin_port": 9000}, 9000),
        ({"host": "0.0.0.0", "admin_port": 8000}, None),
    ],
)
def test_what_is_reached_from_elsewhere_has_its_private_routes_on_another_port(arguments, admin_port):
    settings = Settings(bases=["a=/x"], insecure=True, **arguments)
    assert (settings.admin_port, settings.admin_host) == (admin_port, "127.0.0.1")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_on_this_machine_no_keys_are_needed(host):
    assert Settings(bases=["a=/x"], host=host).catalogue is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"database": "sqlite:///c.db"}, "MOLEX_PEPPER"),
        ({"database": "mysql://x/y", "pepper": "p" * 32}, "'mysql'"),
        ({"database": "sqlite:///c.db", "pepper": "p" * 31}, "MOLEX_PEPPER .* at least 32 characters"),
        ({"admin_port": 65_536}, "admin_port"),
    ],
)
def test_a_catalogue_or_listener_that_cannot_work_is_refused(arguments, message):
    with pytest.raises(ValidationError, match=message):
        Settings(bases=["a=/x"], **arguments)


def test_sources_are_prefixes_of_stores_and_hubs(monkeypatch):
    monkeypatch.setenv("MOLEX_SOURCES", "hf://acme/,s3://bucket/{tenant}/")
    assert Settings(bases={"a": "/x"}).sources == ("hf://acme/", "s3://bucket/{tenant}/")


@pytest.mark.parametrize("prefix", ["hf://", "http://x/", "file:///", "s3://", "bucket"])
def test_a_source_that_would_allow_anything_is_refused(prefix):
    with pytest.raises(ValidationError, match="is no prefix of sources"):
        Settings(bases={"a": "/x"}, sources=[prefix])
