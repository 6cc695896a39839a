"""The texts that requests carry."""

from __future__ import annotations

import csv
from pathlib import Path

COLUMN = "text"


def read_texts(path: Path) -> list[str]:
    """The texts of a file: the column `text` of a .tsv file, else the lines that are not blank.

    Raises ValueError where there are none, OSError where the file cannot be read.
    """
    content = path.read_text(encoding="utf-8")
    texts = _column(content) if path.suffix == ".tsv" else content.splitlines()
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{path} has no texts")
    return texts


def _column(content: str) -> list[str]:
    rows = csv.reader(content.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    header = next(rows, [])
    if COLUMN not in header:
        raise ValueError(f"no column {COLUMN!r} in the first line")
    index = header.index(COLUMN)
    return [row[index] for row in rows if len(row) > index]
