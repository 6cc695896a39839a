"""Readers of training and evaluation files.

Two kinds of example, told apart by the task:

- SEQ_CLS: columns `text`, optionally `text_pair`, and `label`, for regression a number;
- CAUSAL_LM: columns `prompt` and either `completion` (one text) or `references` (a list of texts,
  so only in JSONL). A completion follows its prompt verbatim: nothing is put between them.

The suffix of the file names its format: `.tsv` (tab-separated, quotes are ordinary characters),
`.csv` (RFC 4180) or `.jsonl` (one object a line). Files are UTF-8; tables start with a header line.
Reading is strict: every error is a `DataError` that names the file, the line and the column.
"""

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from molex.errors import MolexError

Record = tuple[int, dict[str, Any]]  # line number, cells by column


class DataError(MolexError):
    """A data file that cannot be used; the message names file, line and column."""


@dataclass(frozen=True)
class LabelledText:
    """One classification or regression example; `label` is as the file spells it."""

    text: str
    label: str
    text_pair: str | None = None


@dataclass(frozen=True)
class PromptText:
    """One generation example; `completions` holds its completion or all of its references."""

    prompt: str
    completions: tuple[str, ...]


Example = TypeVar("Example", LabelledText, PromptText)


@dataclass(frozen=True)
class Dataset(Generic[Example]):
    """The examples of one file, its base name and the sha256 of its bytes.

    Example i comes from line `lines[i]`.
    """

    name: str
    digest: str
    examples: tuple[Example, ...]
    lines: tuple[int, ...]

    def at(self, index: int, column: str) -> str:
        """Where example `index` has its cell `column`, as error messages say it."""
        return place(self.name, self.lines[index], column)


def place(name: str, line: int | None = None, column: str | None = None) -> str:
    """'file, line 3, column 'label'', with the parts that are known."""
    parts = [name]
    if line is not None:
        parts.append(f"line {line}")
    if column is not None:
        parts.append(f"column {column!r}")
    return ", ".join(parts)


def read_labelled(path: Path, *, regression: bool = False) -> Dataset[LabelledText]:
    """Read a classification or regression file.

    Raises:
        DataError: a malformed file, a missing or empty cell, or classes that are real numbers.
    """
    content = _read_bytes(path)
    records = _records(path, content, required=("text", "label"), optional=("text_pair",))
    examples = tuple(_labelled(path.name, line, cells) for line, cells in records)
    if not regression:
        _refuse_real_numbers(path.name, examples)
    return Dataset(path.name, _sha256(content), examples, tuple(line for line, _ in records))


def read_prompts(path: Path) -> Dataset[PromptText]:
    """Read a generation file.

    Raises:
        DataError: a malformed file, or a missing or empty cell.
    """
    content = _read_bytes(path)
    optional = ("completion", "references")
    records = _records(path, content, required=("prompt",), optional=optional)
    examples = tuple(_prompt(path.name, line, cells) for line, cells in records)
    return Dataset(path.name, _sha256(content), examples, tuple(line for line, _ in records))


def label_names(dataset: Dataset[LabelledText]) -> list[str]:
    """The classes of a training file, sorted (as numbers where all are whole numbers).

    Raises:
        DataError: fewer than two classes.
    """
    names = {example.label for example in dataset.examples}
    if len(names) < 2:
        raise DataError(
            f"{place(dataset.name, column='label')}: every label is {names.pop()!r}; "
            "a classifier needs at least two"
        )
    whole = all(_is_whole(name) for name in names)
    return sorted(names, key=lambda name: (int(name) if whole else 0, name))


def label_indices(dataset: Dataset[LabelledText], names: Iterable[str]) -> list[int]:
    """The class index of every example.

    Raises:
        DataError: a label that is not among `names`.
    """
    index_of = {name: index for index, name in enumerate(names)}
    for position, example in enumerate(dataset.examples):
        if example.label not in index_of:
            known = ", ".join(index_of)
            raise DataError(
                f"{dataset.at(position, 'label')}: unknown label {example.label!r} (known: {known})"
            )
    return [index_of[example.label] for example in dataset.examples]


def label_values(dataset: Dataset[LabelledText]) -> list[float]:
    """The number of every example, for regression.

    Raises:
        DataError: a label that is no finite number.
    """
    for position, example in enumerate(dataset.examples):
        if not _is_number(example.label) or not math.isfinite(float(example.label)):
            raise DataError(f"{dataset.at(position, 'label')}: {example.label!r} is no finite number")
    return [float(example.label) for example in dataset.examples]


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _records(
    path: Path, content: bytes, required: tuple[str, ...], optional: tuple[str, ...]
) -> list[Record]:
    readers = {".tsv": _tsv_records, ".csv": _csv_records, ".jsonl": _jsonl_records}
    reader = readers.get(path.suffix)
    if reader is None:
        known = ", ".join(readers)
        raise DataError(f"{path.name}: unknown format {path.suffix!r}; use one of {known}")
    records = list(reader(path.name, _decode(path.name, content)))
    if not records:
        raise DataError(f"{path.name}: no examples")
    for line, cells in records:
        _check_columns(path.name, line, cells, required, optional)
    return records


def _decode(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{place(name, line)}: not UTF-8") from error


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank; only LF and CRLF end a line."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.removesuffix("\r")


def _tsv_records(name: str, text: str) -> Iterator[Record]:
    rows = ((number, line.split("\t")) for number, line in _lines(text))
    return _table_records(name, rows)


def _csv_records(name: str, text: str) -> Iterator[Record]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    return _table_records(name, _csv_rows(name, reader))


def _csv_rows(name: str, reader: Any) -> Iterator[tuple[int, list[str]]]:
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, cells
    except csv.Error as error:
        raise DataError(f"{place(name, reader.line_num)}: {error}") from error


def _table_records(name: str, rows: Iterator[tuple[int, list[str]]]) -> Iterator[Record]:
    _, header = next(rows, (1, []))
    for column in header:
        if header.count(column) > 1:
            raise DataError(f"{place(name, 1, column)}: appears twice in the header")
    for line, cells in rows:
        if len(cells) != len(header):
            raise DataError(
                f"{place(name, line)}: {len(cells)} cells, but the header has {len(header)} columns"
            )
        yield line, dict(zip(header, cells, strict=True))


def _jsonl_records(name: str, text: str) -> Iterator[Record]:
    for number, line in _lines(text):
        try:
            cells = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place(name, number)}: not JSON ({error})") from error
        if not isinstance(cells, dict):
            raise DataError(f"{place(name, number)}: not a JSON object")
        yield number, cells


def _check_columns(
    name: str,
    line: int,
    cells: dict[str, Any],
    required: tuple[str, ...],
    optional: tuple[str, ...],
) -> None:
    for column in required:
        if column not in cells:
            raise DataError(f"{place(name, line, column)}: missing")
    for column in cells:
        if column not in required + optional:
            known = ", ".join(required + optional)
            raise DataError(f"{place(name, line, column)}: unknown column (known: {known})")


def _labelled(name: str, line: int, cells: dict[str, Any]) -> LabelledText:
    pair = cells.get("text_pair")
    return LabelledText(
        text=_text(name, line, "text", cells["text"]),
        label=_label(name, line, cells["label"]),
        text_pair=None if pair is None else _text(name, line, "text_pair", pair),
    )


def _text(name: str, line: int, column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place(name, line, column)}: not a text")
    if not value.strip():
        raise DataError(f"{place(name, line, column)}: empty")
    return value


def _label(name: str, line: int, value: Any) -> str:
    """A class name; JSON may spell it as a whole number."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    return _text(name, line, "label", value).strip()


def _prompt(name: str, line: int, cells: dict[str, Any]) -> PromptText:
    prompt = _text(name, line, "prompt", cells["prompt"])
    if ("completion" in cells) == ("references" in cells):
        raise DataError(f"{place(name, line, 'completion')}: give either 'completion' or 'references'")
    if "completion" in cells:
        return PromptText(prompt, (_text(name, line, "completion", cells["completion"]),))
    references = cells["references"]
    if not isinstance(references, list) or not references:
        raise DataError(f"{place(name, line, 'references')}: not a list of texts")
    texts = tuple(_text(name, line, "references", reference) for reference in references)
    return PromptText(prompt, texts)


def _refuse_real_numbers(name: str, examples: Iterable[LabelledText]) -> None:
    labels = {example.label for example in examples}
    if all(_is_number(label) for label in labels) and not all(map(_is_whole, labels)):
        raise DataError(
            f"{place(name, column='label')}: the labels are real numbers; "
            "train a regression with --problem-type regression"
        )


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True


def _is_whole(label: str) -> bool:
    return label.removeprefix("-").isdecimal() and label.isascii()
