"""docs/architecture.md names files, classes, methods and functions: all of them exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
NAMES = re.findall(r"`([^`\n]+)`", (PROJECT / "docs" / "architecture.md").read_text(encoding="utf-8"))


def _trees() -> Iterator[ast.Module]:
    for package in ("molex", "molex_client", "server"):
        for path in (PROJECT / package).rglob("*.py"):
            yield ast.parse(path.read_text(encoding="utf-8"))


def _members(node: ast.ClassDef) -> set[str]:
    """Methods, declared fields and attributes that methods set on self."""
    names = {n.name for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    names |= {
        n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    }
    stored = (n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
    return names | {n.attr for n in stored}


@pytest.fixture(scope="module")
def classes() -> dict[str, set[str]]:
    found = (node for tree in _trees() for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    return {node.name: _members(node) for node in found}


@pytest.fixture(scope="module")
def functions() -> set[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for tree in _trees() for node in tree.body if isinstance(node, kinds)}


@pytest.mark.parametrize(
    "path", sorted({n for n in NAMES if re.fullmatch(r"[\w/.-]+(\.\w+|/)", n) and "/" in n})
)
def test_file_exists(path):
    assert (PROJECT / path).exists()


@pytest.mark.parametrize("name", sorted({n for n in NAMES if re.fullmatch(r"[A-Z][A-Za-z]+(\.\w+)?", n)}))
def test_class_and_member_exist(name, classes):
    owner, _, member = name.partition(".")
    assert owner in classes
    assert not member or member in classes[owner]


@pytest.mark.parametrize("name", sorted({n[:-2] for n in NAMES if n.endswith("()")}))
def test_function_exists(name, functions):
    assert name in functions
