from __future__ import annotations

import hypothesis.strategies as st
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given

from molex.adapter_file import CONFIG_NAME, WEIGHTS_NAME
from server.errors import ErrorKind, ServiceError
from server.registry import remote
from server.registry.remote import Remote, is_remote

ALLOWED = ("hf://acme/", "hf://shared/repo", "s3://bucket/{tenant}/", "s3://open/adapters")


def kind(uri: str, tenant: str = "") -> ErrorKind | None:
    try:
        Remote(ALLOWED, 1000).check(uri, tenant)
    except ServiceError as error:
        return error.kind
    return None


@pytest.mark.parametrize(
    ("uri", "tenant"),
    [
        ("hf://acme/mood", ""),
        ("hf://acme/mood@main", "other"),
        ("hf://shared/repo@refs/pr/1", ""),
        ("s3://bucket/acme/mood", "acme"),
        ("s3://open/adapters", ""),
        ("s3://open/adapters/a/b.c", ""),
    ],
)
def test_what_begins_like_an_allowed_prefix_is_allowed(uri, tenant):
    assert kind(uri, tenant) is None


@pytest.mark.parametrize(
    ("uri", "tenant"),
    [
        ("hf://acme-evil/mood", ""),
        ("hf://shared/repository", ""),
        ("s3://bucket/other/mood", "acme"),
        ("s3://bucket/acme-2/mood", "acme"),
        ("s3://bucket/mood", ""),
        ("s3://open/adapters2", ""),
        ("gs://open/adapters", ""),
    ],
)
def test_nothing_else_is_fetched(uri, tenant):
    assert kind(uri, tenant) is ErrorKind.FORBIDDEN_SOURCE


@pytest.mark.parametrize(
    "uri",
    [
        "http://169.254.169.254/latest",
        "https://acme/",
        "ftp://x/y",
        "simplecache::s3://open/adapters",
        "s3://open/adapters::file:///etc",
        "s3://open/adapters/../secret",
        "s3://open/adapters/./x",
        "s3://open/adapters//x",
        "s3://open/adapters/%2e%2e/x",
        "s3://open/adapters?versionId=1",
        "s3://user@open/adapters",
        "hf://acme",
        "hf://acme/../other",
        "hf://acme/mood@../x",
        "hf://datasets/acme/mood",
        "hf://acme/mood\n",
    ],
)
def test_other_spellings_are_refused(uri):
    assert kind(uri, "acme") is ErrorKind.INVALID_REQUEST


@given(st.text("s3:/open.adtrs-@%\\\0 ", max_size=40))
def test_no_spelling_leaves_a_prefix(text):
    uri = "s3://open/adapters" + text
    assert is_remote(uri)
    if kind(uri) is None:
        assert text == "" or text[0] == "/"
        assert not {"", ".", ".."} & set(text.split("/")[1:])


@pytest.mark.parametrize("source", ["mood", "/a/b", "file:///a/b"])
def test_folders_are_not_remote(source):
    assert not is_remote(source)


@pytest.fixture
def store(monkeypatch):
    """An object store in memory in place of the one on the network."""
    system = MemoryFileSystem(skip_instance_cache=True)
    system.store.clear()
    monkeypatch.setattr(remote, "url_to_fs", lambda uri: (system, uri.replace("s3:/", "")))
    return system


def refusal(uri: str, limit: int = 1000) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        Remote(ALLOWED, limit).fetch(uri)
    return caught.value


def test_both_files_are_read_from_a_store(store):
    store.pipe({f"/open/adapters/{CONFIG_NAME}": b"{}", f"/open/adapters/{WEIGHTS_NAME}": b"12345"})
    files, source = Remote(ALLOWED, 5).fetch("s3://open/adapters")
    assert (files.config, files.weights, source) == (b"{}", b"12345", "s3://open/adapters")
    error = refusal("s3://open/adapters", 4)
    assert (error.kind, error.param) == (ErrorKind.TOO_LARGE, WEIGHTS_NAME)


def test_what_is_not_there_is_the_callers_mistake(store):
    store.pipe({f"/open/adapters/{CONFIG_NAME}": b"{}"})
    assert refusal("s3://open/adapters").kind is ErrorKind.BAD_ADAPTER


def test_a_store_that_does_not_answer_is_said_to_be_down(store, monkeypatch):
    def fail(_: str) -> None:
        raise ConnectionError("connect to 10.0.0.7 failed")

    monkeypatch.setattr(store, "info", fail)
    error = refusal("s3://open/adapters")
    assert (error.kind, error.retry_after) == (ErrorKind.SOURCE_DOWN, 5)
    assert "10.0.0.7" not in error.message


def test_a_hub_may_not_be_silent_for_ever(monkeypatch):
    asked = {}

    def answer(_, repository, **options):
        asked.update(options)
        raise TimeoutError("read timed out")

    monkeypatch.setattr(remote.HfApi, "model_info", answer)
    assert refusal("hf://open/mood").kind is ErrorKind.SOURCE_DOWN
    assert asked["timeout"] == remote.ANSWER_SECONDS


def test_a_store_without_its_package_is_named(monkeypatch):
    def missing(_: str) -> None:
        raise ImportError("Install gcsfs to access Google Storage")

    monkeypatch.setattr(remote, "url_to_fs", missing)
    assert "lacks the package gcsfs" in refusal("gs://open/adapters").message
