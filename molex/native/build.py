"""Compiles the kernels at their first use on a machine, and loads them.

They are C++ on top of PyTorch: its threads and its `brgemm`, oneDNN's product of blocks, which uses AMX,
AVX-512 and VNNI where the CPU has them, else AVX2. Compiling takes up to a minute; the result is kept in
$XDG_CACHE_HOME/molex-serve, by default ~/.cache/molex-serve.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "src"
COMPILER = "c++"
FLAGS = (
    "-O3",
    "-std=c++20",
    # Nobody reads errno or floating-point exceptions. NaN and infinity keep their meaning.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-fPIC",
    "-shared",
)
INSTRUCTIONS = {
    "AVX512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "AVX2": ("-march=x86-64-v3",),
}
"""By what PyTorch calls the CPU, which ATEN_CPU_CAPABILITY in the environment sets lower."""

log = logging.getLogger(__name__)


def why_not(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why layers of a precision cannot run on the kernels; None where they can."""
    if device.type != "cpu" or platform.machine() != "x86_64":
        return "run on x86-64 CPUs alone"
    if instructions() not in INSTRUCTIONS:
        return "need a CPU with AVX2"
    if dtype not in (torch.float32, torch.bfloat16):
        return "compute in float32 and bfloat16 alone"
    return load()


@cache
def load() -> str | None:
    """Load the kernels, compiled now if they never were; returns why that failed, or None."""
    try:
        torch.classes.load_library(str(library()))
    except (OSError, RuntimeError) as error:
        log.warning("the kernels could not be built: %s", error)
        return f"could not be built: {error}"
    return None


def library() -> Path:
    """The compiled kernels, from the cache if they are there. Raises OSError where they can't be compiled."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "molex-serve"
    compiled = folder / f"kernels-{_digest()}.so"
    if not compiled.exists():
        if shutil.which(COMPILER) is None:
            raise OSError(f"there is no {COMPILER} on the PATH")
        log.info("compiling the kernels, which takes up to a minute at the first start")
        folder.mkdir(parents=True, exist_ok=True)
        # Several processes may start at once: each compiles into a file of its own, and the last one stays.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            output = Path(scratch) / compiled.name
            _compile(output)
            output.replace(compiled)
    return compiled


def _compile(output: Path) -> None:
    torch_folder = Path(torch.__file__).parent
    include, lib = torch_folder / "include", torch_folder / "lib"
    paths = [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}", f"-L{lib}"]
    command = [COMPILER, *_flags(), *paths, str(SOURCES / "library.cpp"), "-o", str(output)]
    done = subprocess.run([*command, "-ltorch", "-ltorch_cpu", "-lc10"], capture_output=True, text=True)
    if done.returncode != 0:
        log.debug("%s", done.stderr)
        raise OSError(f"{COMPILER} failed: {_first_error(done)}")


def _first_error(done: subprocess.CompletedProcess[str]) -> str:
    """What a compiler says is wrong; behind it are lines that follow from it, or tell nothing."""
    lines = (line.strip() for line in done.stderr.splitlines())
    return next((line for line in lines if "error" in line), f"it ended with {done.returncode}")


def instructions() -> str:
    """What the CPU has, as PyTorch calls it."""
    return torch.backends.cpu.get_cpu_capability()


def _flags() -> Sequence[str]:
    return FLAGS + INSTRUCTIONS[instructions()]


def _digest() -> str:
    """Of everything that the compiled library depends on."""
    digest = hashlib.sha256(repr((_flags(), torch.__version__)).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
