from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from molex.adapter_file import AdapterFiles, read_files
from server.errors import ErrorKind, ServiceError
from server.registry.storage import Storage

HEADER = 40


def files(letter: str, size: int = 98) -> AdapterFiles:
    """A hundred bytes, or others, the weights with a header that says so."""
    values = size - 8 - HEADER
    header = f'{{"x": {{"data_offsets": [0, {values}]}}}}'.ljust(HEADER).encode()
    return AdapterFiles(b"{}", HEADER.to_bytes(8, "little") + header + letter.encode() * values)


@pytest.fixture
def opened(tmp_path):
    """Opens the storage of this test, as one process after another would."""
    made: list[Storage] = []

    def make(max_bytes: int = 1000, folder: Path | None = tmp_path / "storage") -> Storage:
        for before in made:
            before.close()
        made.append(Storage(folder, max_bytes))
        made[-1].open()
        return made[-1]

    yield make
    for storage in made:
        storage.close()


def test_what_is_put_is_there_also_for_the_next_process(opened):
    storage = opened()
    storage.put(files("a"))
    storage.put(files("a"))
    digest = files("a").digest
    assert digest in storage
    assert read_files(storage.path(digest)) == files("a")
    assert opened().digests() == {digest}


def test_nobody_else_reads_it(opened):
    storage = opened()
    storage.put(files("a"))
    for path in (storage.folder, *storage.folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_two_servers_do_not_share_a_folder(opened, tmp_path):
    opened()
    with pytest.raises(ServiceError, match="another server uses the storage folder"):
        Storage(tmp_path / "storage", 1000).open()


def test_what_was_left_unfinished_is_gone(opened):
    storage = opened()
    storage.put(files("a"))
    (storage.folder / ".unfinished-x").mkdir()
    (storage.folder / ".unfinished-x" / "adapter_config.json").write_bytes(b"{")
    assert opened().digests() == {files("a").digest}
    assert not list(storage.folder.glob(".unfinished-*"))


def test_a_write_that_fails_leaves_nothing(opened, monkeypatch):
    storage = opened()

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ServiceError, match="No space left on device") as caught:
        storage.put(files("a"))
    assert caught.value.kind is ErrorKind.STORAGE_FULL
    assert storage.digests() == set()
    assert [path.name for path in storage.folder.iterdir()] == [".lock"]


@pytest.mark.parametrize("touched", "ab")
def test_what_can_be_fetched_again_is_evicted_least_recently_used_first(opened, touched):
    storage = opened(300)
    names = {letter: files(letter).digest for letter in "abcd"}
    for second, letter in enumerate("abc"):
        storage.put(files(letter))
        os.utime(storage.path(names[letter]), (second, second))
    storage.evictable = lambda: {names["a"], names["b"]}
    storage.touch(names[touched])
    storage.put(files("d"))
    assert storage.digests() == {names[touched], names["c"], names["d"]}
    with pytest.raises(ServiceError, match="no room for 202 bytes in the storage") as caught:
        storage.put(files("e", 200))
    assert caught.value.kind is ErrorKind.STORAGE_FULL
    assert storage.digests() == {names[touched], names["c"], names["d"]}


def test_only_what_is_named_is_kept(opened):
    storage = opened()
    for letter in "abc":
        storage.put(files(letter))
    storage.keep_only({files("b").digest})
    storage.remove_unless(set, files("c").digest)
    assert storage.digests() == {files("b").digest}
    storage.remove_unless(set, files("b").digest)
    assert opened().digests() == set()


def test_what_is_needed_by_the_time_of_its_removal_stays(opened):
    storage = opened()
    digest = files("a").digest
    storage.put(files("a"))

    def needed() -> set[str]:
        # Until the removal nobody is told that the files are there.
        assert storage._lock.locked()
        return {digest}

    storage.remove_unless(needed, digest)
    assert read_files(storage.path(digest)) == files("a")


def test_a_slow_write_holds_up_nobody_who_looks(opened, monkeypatch):
    storage = opened()
    storage.put(files("a"))
    writes, go = Event(), Event()
    monkeypatch.setattr(os, "fsync", lambda _: writes.set() or go.wait(60))
    with ThreadPoolExecutor(2) as pool:
        writing = pool.submit(storage.put, files("b"))
        assert writes.wait(60)
        assert pool.submit(storage.digests).result(60) == {files("a").digest}
        go.set()
        writing.result()


def test_without_a_folder_it_ends_with_the_process(opened):
    storage = opened(folder=None)
    storage.put(files("a"))
    assert stat.S_IMODE(storage.folder.stat().st_mode) == 0o700
    storage.close()
    assert not storage.folder.exists()


def test_a_folder_that_cannot_be_made_is_an_error(opened, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ServiceError, match="the storage folder cannot be used"):
        opened(folder=tmp_path / "file" / "storage")
