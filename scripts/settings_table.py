"""Writes the table of every setting into docs/operations.md.

python -m scripts.settings_table
"""

from __future__ import annotations

import re
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Le
from pydantic.fields import FieldInfo

from server.settings import Settings, is_option

PAGE = Path(__file__).resolve().parents[1] / "docs" / "operations.md"
BLOCK = re.compile(r"(<!-- settings -->\n).*?(<!-- end -->)", re.DOTALL)


def table() -> str:
    """The settings as a Markdown table."""
    rows = [_row(name, field) for name, field in Settings.model_fields.items()]
    return "\n".join(["| option, variable | default | values | meaning |", "|---|---|---|---|", *rows, ""])


def with_table(page: str) -> str:
    """The page with the table of today in its block."""
    return BLOCK.sub(lambda found: found[1] + table() + found[2], page)


def _row(name: str, field: FieldInfo) -> str:
    extra = field.json_schema_extra
    flag = extra.get("flag") if isinstance(extra, dict) else None
    option = f"`{flag or '--' + name.replace('_', '-')}`, " if is_option(field) else ""
    default = "" if field.default in (None, ...) or flag else str(field.default).lower()
    cells = [f"{option}`MOLEX_{name.upper()}`", default, _values(field), field.description or ""]
    return f"| {' | '.join(cells)} |"


def _values(field: FieldInfo) -> str:
    """The values that are allowed, where the type or its bounds say so."""
    kinds = [kind for kind in get_args(field.annotation) if kind is not NoneType]
    literal: Any = next((kind for kind in [field.annotation, *kinds] if get_origin(kind) is Literal), None)
    if literal is not None:
        return ", ".join(get_args(literal))
    low = next((bound.ge for bound in field.metadata if isinstance(bound, Ge)), None)
    high = next((bound.le for bound in field.metadata if isinstance(bound, Le)), None)
    return "" if low is None or high is None else f"{low} to {high:,}"


def main() -> None:
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
