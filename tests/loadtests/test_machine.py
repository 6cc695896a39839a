"""What a report says of the machine."""

from __future__ import annotations

import pytest

from loadtests import machine as module
from loadtests.machine import machine

CPUINFO = """processor\t: 0
model name\t: Some CPU @ 2.00GHz
flags\t\t: fpu sse avx2 avx512f avx512_bf16 amx_tile amx_bf16 vmx

processor\t: 1
model name\t: Some CPU @ 2.00GHz
"""


@pytest.fixture
def cpuinfo(monkeypatch, tmp_path):
    """Where the facts of the processor are read from; it is not there yet."""
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(module, "CPUINFO", path)
    return path


def test_name_and_flags_that_matter(cpuinfo):
    cpuinfo.write_text(CPUINFO, encoding="utf-8")
    facts = machine()
    assert facts.cpu == "Some CPU @ 2.00GHz"
    assert facts.flags == ["amx_bf16", "amx_tile", "avx2", "avx512_bf16", "avx512f"]
    assert facts.cores >= 1


def test_without_cpuinfo_and_git(cpuinfo, monkeypatch):
    monkeypatch.setenv("PATH", "")
    facts = machine()
    assert facts.cpu
    assert (facts.flags, facts.commit) == ([], None)
