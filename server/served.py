"""A version of an adapter as requests find it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from molex.config import AdapterConfig


@dataclass(frozen=True, eq=False)
class ServedAdapter:
    """An adapter under the name that requests call it by: all but its weights, which may not be in memory."""

    name: str
    """`TENANT/NAME`, or `NAME` alone where the operator shares it."""
    base: str
    folder: Path
    source: str
    """The folder, as its loader named it."""
    config: AdapterConfig
    digest: str
    labels: Mapping[int, str]
    nbytes: int
    """What its weights take in memory."""
    version: int = 0
    """Its number in the catalogue; 0 for what is read in place and not in there."""
    pinned: bool = False
    """Whether it stays in memory once it is there."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Seconds since the epoch."""

    @property
    def classifies(self) -> bool:
        return self.config.task_type == "SEQ_CLS"


def tenant_of(name: str) -> str:
    """The tenant in the name of an adapter; empty where the operator shares it."""
    return name.rpartition("/")[0]
