"""The machine: CPU, threads, memory, and the versions of the libraries that use them."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from server.doctor.finding import Finding
from server.precision import BFLOAT16_FLAGS

DISTRIBUTION = "molex-serve"
SHOWN = ("torch", "transformers", "tokenizers", "safetensors")
FLAGS = ("avx2", "avx512_f", "avx512_vnni", *BFLOAT16_FLAGS, "amx_int8")
"""What kernels are chosen by, as PyTorch names it."""
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
GIB = 1 << 30


def machine() -> Iterator[Finding]:
    yield _system()
    yield _cpu()
    yield _threads()
    yield Finding("memory", f"{total_memory() / GIB:.1f} GiB, {available_memory() / GIB:.1f} GiB available")
    yield packages()


def total_memory() -> int:
    """Bytes that this machine, or its container, has."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(physical, _limit("memory.max") or physical)


def available_memory() -> int:
    """Bytes that a process could still take here."""
    free = 1024 * _number(r"^MemAvailable:\s*(\d+) kB", MEMINFO.read_text(encoding="ascii"))
    limit = _limit("memory.max")
    if limit is None:
        return free
    # A container is charged for files that it has read, which give way.
    cached = _number(r"^inactive_file (\d+)", _cgroup("memory.stat") or "")
    return min(free, limit - (_limit("memory.current") or 0) + cached)


def packages() -> Finding:
    """The libraries, and whether each is in the range that this version was made for."""
    versions = ", ".join(f"{name} {version(name)}" for name in SHOWN)
    try:
        wanted = [Requirement(text) for text in requires(DISTRIBUTION) or []]
    except PackageNotFoundError:
        return Finding("packages", f"{versions}; ranges unknown, because {DISTRIBUTION} is not installed")
    wrong = [_misfit(need) for need in wanted if need.marker is None or need.marker.evaluate({"extra": ""})]
    return Finding("packages", versions, problem="; ".join(filter(None, wrong)) or None)


def _misfit(need: Requirement) -> str | None:
    try:
        found = version(need.name)
    except PackageNotFoundError:
        return f"the package {need.name} is not installed"
    fits = need.specifier.contains(found, prereleases=True)
    return None if fits else f"the package {need.name} is {found}, but has to be {need.specifier}"


def _system() -> Finding:
    try:
        own = version(DISTRIBUTION)
    except PackageNotFoundError:
        own = "(not installed)"
    system = f"{platform.system()} {platform.release()} on {platform.machine()}"
    return Finding("system", f"{DISTRIBUTION} {own}, Python {platform.python_version()}, {system}")


def _cpu() -> Finding:
    found = torch.cpu.get_capabilities()
    flags = [flag for flag in FLAGS if found.get(flag)]
    return Finding(
        "cpu", f"{found.get('cpu_name', 'unknown')}; {', '.join(flags) or 'no vector instructions'}"
    )


def _threads() -> Finding:
    threads, cpus = torch.get_num_threads(), usable_cpus()
    fact = f"{threads} for products, on {cpus:g} of {os.cpu_count()} CPUs"
    if threads > cpus:
        fact += f": more than there are CPUs, so set OMP_NUM_THREADS={max(1, int(cpus))}"
    return Finding("threads", fact)


def usable_cpus() -> float:
    """CPUs that this process may run on, and the share of their time that its container gives it."""
    cpus = float(len(os.sched_getaffinity(0)))
    quota = _cgroup("cpu.max")
    if quota is None or quota.startswith("max"):
        return cpus
    used, period = map(int, quota.split())
    return min(cpus, used / period)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text, re.MULTILINE)
    return int(found[1]) if found else 0


def _limit(name: str) -> int | None:
    text = _cgroup(name)
    return int(text) if text is not None and text.isdecimal() else None


def _cgroup(name: str) -> str | None:
    """A value of the container that this process is in, if there is one."""
    try:
        return (CGROUP / name).read_text(encoding="ascii").strip()
    except OSError:
        return None
