"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
RELEVANT_FLAGS = re.compile(
    r"avx2|avx512f|avx512_(bf16|vnni|fp16)|avx_vnni|amx_\w+|asimd\w*|bf16|i8mm|sve\w*"
)
"""Vector and matrix instructions that the kernels of inference choose by."""


@dataclass(frozen=True)
class Machine:
    """`commit`: of this checkout, with `-dirty` if files differ from it; None without git.

    `load`: processes that ran or waited, on average over the minute before the experiment.
    """

    cpu: str
    flags: list[str]
    cores: int
    load: float
    system: str
    python: str
    commit: str | None


def machine() -> Machine:
    info = CPUINFO.read_text(encoding="utf-8") if CPUINFO.exists() else ""
    flags = _field(info, r"flags|Features").split()
    return Machine(
        cpu=_field(info, "model name") or platform.machine(),
        flags=sorted(flag for flag in flags if RELEVANT_FLAGS.fullmatch(flag)),
        cores=len(os.sched_getaffinity(0)),
        load=os.getloadavg()[0],
        system=platform.platform(),
        python=platform.python_version(),
        commit=_commit(),
    )


def _field(info: str, name: str) -> str:
    found = re.search(rf"^(?:{name})\s*: (.*)$", info, re.MULTILINE)
    return found[1] if found else ""


def _commit() -> str | None:
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
