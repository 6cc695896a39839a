"""A base model whose layers were exported as graphs: its folder, and what is said of it there.

config.json, model.safetensors, tokenizer…   as transformers writes them, without weights of layers
layers/000.project.onnx, 000.finish.onnx, …  the halves of each layer, behind them those of the routed
                                             branch if it has a precision of its own
vocabulary.onnx                              the language model head of a decoder, without its weights
molex_export.json                            precisions, and the SHA-256 of each graph
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

from molex.errors import BaseModelError
from molex.native.weights import Bits
from molex.strict_json import parse_object

ABOUT = "molex_export.json"
FORMAT = 1
VOCABULARY = "vocabulary.onnx"
Precision = Literal["fp32", "int8", "int4"]
"""Of the weights of layers."""
PRECISIONS: dict[Precision, Bits | None] = {"fp32": None, "int8": 8, "int4": 4}
"""Their bits; None is float32."""


@dataclass(frozen=True)
class Exported:
    """The digest of the base's own weights, the precisions of layers and of routed ones, and the graphs.

    `files` gives the SHA-256 of each graph by its path in the folder.
    """

    digest: str
    precision: Precision
    routed_precision: Precision
    files: Mapping[str, str]

    @property
    def bits(self) -> Bits | None:
        return PRECISIONS[self.precision]

    @property
    def routed_bits(self) -> Bits | None:
        return PRECISIONS[self.routed_precision]

    def check(self, bits: Bits | None, routed_bits: Bits | None, backend: str) -> None:
        """Raises BaseModelError where layers are to run on another backend, or in other bits."""
        if backend not in ("auto", "onnx"):
            raise BaseModelError(f"its layers were exported: they run with the backend onnx, not {backend}")
        if bits not in (None, self.bits) or routed_bits not in (None, self.routed_bits):
            raise BaseModelError(f"its layers were exported in {self}, and run in nothing else")

    def __str__(self) -> str:
        is_one = self.routed_precision == self.precision
        return self.precision + ("" if is_one else f", routed ones in {self.routed_precision}")


def is_exported(base: str | Path) -> bool:
    return (Path(base) / ABOUT).is_file()


def graph_bytes(folder: Path) -> int:
    """What the graphs of an exported base take on the disk. Raises BaseModelError as `read_about`."""
    graphs = (folder / name for name in read_about(folder).files)
    return sum(graph.stat().st_size for graph in graphs if graph.is_file())


def write_graphs(
    folder: Path, layers: Iterable[tuple[bytes, bytes]], vocabulary: bytes | None
) -> dict[str, str]:
    """Add the graphs to a folder; returns `Exported.files`."""
    (folder / "layers").mkdir()
    files = {}

    def write(name: str, graph: bytes) -> None:
        (folder / name).write_bytes(graph)
        files[name] = sha256(graph).hexdigest()

    for number, halves in enumerate(layers):
        for name, graph in zip(_halves(number), halves, strict=True):
            write(name, graph)
    if vocabulary is not None:
        write(VOCABULARY, vocabulary)
    return files


def write_about(folder: Path, about: Exported) -> None:
    text = json.dumps({"molex_export": FORMAT, **asdict(about)}, indent=2)
    (folder / ABOUT).write_text(text + "\n", encoding="utf-8")


def read_about(folder: Path) -> Exported:
    """Raises BaseModelError where the folder does not say what it holds, or says it in another version."""
    try:
        return _parsed((folder / ABOUT).read_bytes())
    except (OSError, TypeError, ValueError) as error:
        raise BaseModelError(f"base model {str(folder)!r}: {ABOUT}: {error}") from error


def _parsed(text: bytes) -> Exported:
    fields = parse_object(text)
    if (version := fields.pop("molex_export", None)) != FORMAT:
        raise ValueError(f"molex_export is {version!r}, not {FORMAT}")
    about = Exported(**fields)
    for name in ("precision", "routed_precision"):
        if (value := getattr(about, name)) not in PRECISIONS:
            raise ValueError(f"{name} is {value!r}, not one of {', '.join(PRECISIONS)}")
    if not isinstance(about.files, dict):
        raise ValueError("files is no object")
    return about


def read_layers(folder: Path, about: Exported, num_layers: int) -> Iterator[tuple[bytes, bytes]]:
    """The halves of each layer, and those of the routed branch if it has its own.

    Raises BaseModelError where a graph is missing or is not the one that was exported.
    """
    for number in range(num_layers * len({about.precision, about.routed_precision})):
        first, second = (_read(folder, about, name) for name in _halves(number))
        yield first, second


def read_vocabulary(folder: Path, about: Exported) -> bytes | None:
    """None for encoders. Raises BaseModelError as `read_layers`."""
    return _read(folder, about, VOCABULARY) if VOCABULARY in about.files else None


def _halves(number: int) -> tuple[str, str]:
    return f"layers/{number:03}.project.onnx", f"layers/{number:03}.finish.onnx"


def _read(folder: Path, about: Exported, name: str) -> bytes:
    try:
        graph = (folder / name).read_bytes()
    except OSError as error:
        raise BaseModelError(f"base model {str(folder)!r}: {name}: {error.strerror}") from error
    if sha256(graph).hexdigest() != about.files.get(name):
        raise BaseModelError(f"base model {str(folder)!r}: {name} is not what was exported")
    return graph
