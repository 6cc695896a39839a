"""Folders that are either whole or not there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Make a new folder by a function that fills it; nothing is left where that fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        write(unfinished)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
