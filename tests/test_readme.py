"""The README does what it says: its blocks run, its commands exist, its map is the tree."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
from pathlib import PurePosixPath
from typing import Any

import pytest
from typer.testing import CliRunner

from examples.demo import RESTAURANTS, TEXTS, ask_everything
from scripts.readme_output import PROJECT, README, Example, examples, run
from server.cli import app
from server.settings import Settings

TEXT = README.read_text(encoding="utf-8")
EXAMPLES = examples(TEXT)
MAPPED_FOLDERS = (
    "molex",
    "molex_client",
    "server",
    "benchmarks",
    "loadtests",
    "examples",
    "scripts",
    "deploy",
)
VOLATILE = ("id", "created", "updated", "text", "content")
"""Fields that change from run to run, or with the rounding of the CPU."""
PROBABILITY_TOLERANCE = 0.02
"""Two CPUs sum in different orders; a classifier's probabilities then differ in the third digit."""
TOKEN_COUNTS = ("completion_tokens", "total_tokens")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.code.split("\n")[0][:40])
def test_example_prints_what_the_readme_shows(example: Example, demo_url):
    if "curl" in example.code and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    printed = run(example, demo_url)
    if printed.startswith("{"):
        assert_alike(json.loads(printed), json.loads(example.output))
    elif "stream" in example.code:
        assert printed.strip()
    else:
        assert_lines_alike(printed.splitlines(), example.output.splitlines())


def test_demo_gets_an_answer_to_everything(demo_url):
    answers = asyncio.run(ask_everything(demo_url))
    assert [answer for answer in answers if isinstance(answer, BaseException)] == []
    assert len(answers) == sum(map(len, TEXTS.values())) + len(RESTAURANTS) + 1


@pytest.mark.parametrize("script", ["client.py", "offline.py", "training.py"])
def test_example_script_runs(script, demo_url):
    arguments = [demo_url] if script == "client.py" else []
    command = [sys.executable, str(PROJECT / "examples" / script), *arguments]
    done = subprocess.run(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    assert len(done.stdout.splitlines()) > 3


def assert_alike(printed: Any, shown: Any, key: str = "") -> None:
    """The same shape, labels and names; numbers that the CPU computes only nearly."""
    assert type(printed) is type(shown), key
    if isinstance(shown, dict):
        assert printed.keys() == shown.keys()
        for name in shown:
            assert_alike(printed[name], shown[name], name)
    elif isinstance(shown, list):
        assert len(printed) == len(shown), key
        for one, other in zip(printed, shown, strict=True):
            assert_alike(one, other, key)
    elif isinstance(shown, float):
        assert printed == pytest.approx(shown, abs=PROBABILITY_TOLERANCE), key
    elif key not in (*VOLATILE, *TOKEN_COUNTS, "routes"):
        assert printed == shown, key


def assert_lines_alike(printed: list[str], shown: list[str]) -> None:
    """The same words and as many routed layers; probabilities nearly."""
    assert len(printed) == len(shown)
    for one, other in zip(printed, shown, strict=True):
        assert re.sub(r"[\d.]+", "0", one) == re.sub(r"[\d.]+", "0", other)
        numbers, expected = (re.findall(r"\d+\.\d+", line) for line in (one, other))
        assert [float(n) for n in numbers] == pytest.approx(
            [float(n) for n in expected], abs=PROBABILITY_TOLERANCE
        )


def test_there_are_examples_of_both_kinds():
    assert {example.language for example in EXAMPLES} == {"bash", "python"}


@pytest.mark.parametrize("command", ["serve", "train", "evaluate", "convert"])
def test_options_in_the_readme_exist(command):
    shell = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)).replace("\\\n", " ")
    lines = [line for line in shell.splitlines() if line.startswith(f"molex {command} ")]
    assert lines
    known = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "300", "TERM": "dumb"}).output
    for option in {option for line in lines for option in re.findall(r"--[a-z-]+", line)}:
        assert option in known


def test_settings_table_shows_the_defaults():
    rows = re.findall(r"^\| (`--[^|]*) \| ([^|]*) \|", TEXT, re.MULTILINE)
    assert rows
    for flags, defaults in rows:
        names = [flag.replace("-", "_") for flag in re.findall(r"--([a-z-]+)", flags)]
        for name, shown in zip(names, defaults.split(", "), strict=True):
            default = Settings.model_fields["bases" if name == "base" else name].default
            if shown.strip() and not shown.startswith("`"):
                assert shown.strip() == str(default)


def test_every_http_route_is_listed():
    shown = set(re.findall(r"`((?:GET|POST|PUT|DELETE) /\S+)`", TEXT))
    sources = (path.read_text(encoding="utf-8") for path in (PROJECT / "server" / "routes").glob("*.py"))
    declared = [found for source in sources for found in re.findall(r'@router\.(\w+)\("([^"]+)"', source)]
    templates = {f"{method.upper()} {path.replace(':path', '')}" for method, path in declared}
    assert templates <= shown


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "examples/README.md",
        "docs/architecture.md",
        "docs/client.md",
        "docs/operations.md",
        "docs/performance.md",
        "docs/security.md",
    ],
)
def test_links_lead_to_files(page):
    path = PROJECT / page
    links = re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


def map_entries() -> set[str]:
    """Paths of the map; those of folders end with a slash."""
    found = re.search(r"<!-- map -->\n```text\n(.*?)```", TEXT, re.DOTALL)
    assert found
    entries, top = set(), ""
    for line in found[1].splitlines():
        name, description = line.split(maxsplit=1)
        assert description
        top = top if line.startswith(" ") else name
        entries.add(top + name if line.startswith(" ") else name)
    return entries


def test_map_shows_the_tree():
    entries = map_entries()
    assert [entry for entry in entries if not (PROJECT / entry).exists()] == []
    if not (PROJECT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-C", str(PROJECT), "ls-files", *MAPPED_FOLDERS]
    tracked = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    folders = tuple(entry for entry in entries if entry.count("/") > 1 and entry.endswith("/"))
    unmapped = [path for path in tracked if path not in entries and not path.startswith(folders)]
    assert [path for path in unmapped if PurePosixPath(path).name != "__init__.py"] == []
