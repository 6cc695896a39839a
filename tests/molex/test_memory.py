"""What a process keeps. In processes of their own: the settings are for a whole process."""

from __future__ import annotations

import gc
import os
import resource
from pathlib import Path
from weakref import ref

import torch

from molex.memory import freeze_what_is_loaded, keep_compiled_kernels, keep_freed_memory
from molex.prepack import PrepackedLinear
from tests.forks import run_apart


def page_faults(*, keep: bool) -> int:
    """Those of a second pass over the same sizes, which may find its pages where the first one left them."""
    if keep:
        assert keep_freed_memory()
    allocate()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    allocate()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def allocate() -> None:
    """Blocks are of more than 32 MB: below that, glibc may decide by itself to keep some."""
    for _ in range(3):
        blocks = [torch.ones(10_000_000) for _ in range(2)]
        del blocks


def compile_twice(report: Path, *, keep: bool) -> None:
    """Two passes over more sizes than oneDNN keeps by default; it reports each kernel that it compiles."""
    os.environ["ONEDNN_VERBOSE"] = "profile_create"
    os.dup2(os.open(report, os.O_WRONLY | os.O_CREAT), 1)
    if keep:
        keep_compiled_kernels()
    layer = PrepackedLinear(torch.nn.Linear(4, 4))
    with torch.inference_mode():
        for number in range(2):
            os.write(1, b"pass %d\n" % number)
            for rows in range(1, 1100):
                layer(torch.zeros(rows, 4))


def compiled_again(report: Path, *, keep: bool) -> int:
    run_apart(compile_twice, report, keep=keep)
    first, second = report.read_text(encoding="utf-8").split("pass 1")
    assert first.count("create:cache_miss") >= 1099
    return second.count("create:cache_miss")


def test_kernels_are_kept_from_pass_to_pass(tmp_path):
    assert compiled_again(tmp_path / "default", keep=False) > 0
    assert compiled_again(tmp_path / "kept", keep=True) == 0


def test_pages_are_kept_from_pass_to_pass():
    assert run_apart(page_faults, keep=True) < run_apart(page_faults, keep=False)


def looked_at(*, frozen: bool) -> int:
    """How many objects a full collection visits where a few thousand lists have been kept from the start."""
    kept = [[number] for number in range(5000)]
    if frozen:
        freeze_what_is_loaded()
    assert len(kept) == 5000
    return len(gc.get_objects())


def test_collections_leave_out_what_is_frozen():
    assert run_apart(looked_at, frozen=False) > 5000
    assert run_apart(looked_at, frozen=True) < 1000


def freed_when_let_go() -> bool:
    thing = torch.nn.Linear(2, 2)
    gone = ref(thing)
    freeze_what_is_loaded()
    del thing
    return gone() is None


def test_what_is_frozen_is_freed_with_its_last_reference():
    assert run_apart(freed_when_let_go)
