"""What figures were measured on."""

from __future__ import annotations

import os
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from typing import Any

import torch

from loadtests.machine import machine

PACKAGES = ("torch", "transformers", "peft")
GIB = 1 << 30


@cache
def facts() -> dict[str, Any]:
    """The machine with its GPU and this checkout's commit, versions of packages, when, and how busy it was.

    `load`: processes that ran or waited, on average over the last minute. All is as it was at the first call,
    which `benchmarks.common.command_line` makes: a commit made during a run is not what was measured.
    """
    seen = asdict(machine())
    load = seen.pop("load")
    seen["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1)
    seen["threads"] = torch.get_num_threads()
    seen["kernels"] = torch.backends.cpu.get_cpu_capability()
    if torch.cuda.is_available():
        seen["gpu"] = torch.cuda.get_device_name()
    return {
        "machine": seen,
        "versions": {name: version(name) for name in PACKAGES},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": load,
    }
