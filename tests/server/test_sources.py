from __future__ import annotations

import os
import shutil

import pytest

from server.errors import ErrorKind, ServiceError
from server.sources import Sources

LIMIT = 10_000_000


@pytest.fixture
def root(make_adapters, tmp_path):
    return make_adapters(tmp_path / "adapters")


@pytest.fixture
def sources(models, root):
    return Sources(models, root)


@pytest.fixture
def outside(root, tmp_path):
    shutil.copytree(root / "topic", tmp_path / "outside")
    return tmp_path / "outside"


def refusal(call, *arguments) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        call(*arguments)
    return caught.value


def test_callers_name_folders_by_path_or_uri(sources, root):
    for source in ("topic", str(root / "topic"), (root / "topic").as_uri()):
        assert sources.resolve(source) == root / "topic"


def test_a_uri_may_have_escapes(sources, root):
    (root / "a b").mkdir()
    assert sources.resolve((root / "a b").as_uri()) == root / "a b"


@pytest.mark.parametrize(
    "source",
    ["OUTSIDE", "../outside", "topic/../../outside", "/etc", "..", "file:///etc", "file:///x/../etc"],
)
def test_callers_cannot_leave_the_root_by_path(sources, outside, source):
    error = refusal(sources.resolve, source.replace("OUTSIDE", str(outside)))
    assert error.kind is ErrorKind.FORBIDDEN_SOURCE


def test_callers_cannot_leave_the_root_by_link(sources, root, outside):
    (root / "link").symlink_to(outside)
    assert refusal(sources.resolve, "link").kind is ErrorKind.FORBIDDEN_SOURCE
    weights = root / "topic" / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(outside / "adapter_model.safetensors")
    assert refusal(sources.resolve, "topic").kind is ErrorKind.FORBIDDEN_SOURCE


@pytest.mark.parametrize("source", ["nowhere", "topic/adapter_config.json", "x" * 1000, "a\0b", "a%2F.."])
def test_a_source_that_is_no_folder_is_refused(sources, source):
    error = refusal(sources.resolve, source)
    assert (error.kind, error.param) == (ErrorKind.NO_SOURCE, "source")


def test_a_link_to_itself_is_refused(sources, root):
    (root / "loop").symlink_to(root / "loop")
    assert refusal(sources.resolve, "loop").kind.status == 400


def test_without_a_root_callers_load_nothing(models):
    assert refusal(Sources(models, None).resolve, "topic").kind is ErrorKind.FORBIDDEN_SOURCE


def test_a_copy_is_what_the_folder_holds(sources, root):
    files = sources.copy(root / "topic", LIMIT)
    assert files.config == (root / "topic" / "adapter_config.json").read_bytes()
    assert files.weights == (root / "topic" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_what_is_no_regular_file_is_refused_by_name(sources, root, outside, name):
    path = root / "topic" / name

    def problem() -> str:
        error = refusal(sources.copy, root / "topic", LIMIT)
        assert (error.kind, error.param) == (ErrorKind.BAD_ADAPTER, name)
        assert str(root) not in error.message
        return error.message

    path.unlink()
    assert problem() == f"{name}: cannot be read (No such file or directory)"
    path.symlink_to(outside / name)
    assert problem() == f"{name}: is a link"
    path.unlink()
    os.mkfifo(path)
    assert problem() == f"{name}: is no regular file"
    path.unlink()
    path.mkdir()
    assert problem() == f"{name}: is no regular file"


def test_a_folder_that_became_a_link_is_refused(sources, root, outside):
    shutil.rmtree(root / "topic")
    (root / "topic").symlink_to(outside)
    assert refusal(sources.copy, root / "topic", LIMIT).kind is ErrorKind.BAD_ADAPTER


def test_a_folder_in_one_that_became_a_link_is_refused(sources, root, outside, tmp_path):
    shutil.copytree(root / "topic", root / "team" / "topic")
    assert sources.copy(root / "team" / "topic", LIMIT).config
    shutil.rmtree(root / "team")
    (tmp_path / "elsewhere").mkdir()
    outside.rename(tmp_path / "elsewhere" / "topic")
    (root / "team").symlink_to(tmp_path / "elsewhere")
    assert refusal(sources.copy, root / "team" / "topic", LIMIT).kind is ErrorKind.BAD_ADAPTER


def test_a_file_that_is_too_large_is_refused_by_name(sources, root):
    weights = root / "topic" / "adapter_model.safetensors"
    size = weights.stat().st_size
    error = refusal(sources.copy, root / "topic", size - 1)
    assert (error.kind, error.param) == (ErrorKind.TOO_LARGE, weights.name)
    assert f"has {size} bytes; max_adapter_bytes is {size - 1}" in error.message
    assert sources.copy(root / "topic", size).weights == weights.read_bytes()
