"""Runs the examples of README.md, or of other pages, and writes what they print under them.

    python -m scripts.readme_output [PAGE …]     # starts a server with the demo bases, on a free port

An example is a fenced block after the line `<!-- run -->`; the next fenced block is its output.
tests/test_readme.py and tests/test_example_pages.py run the same blocks and compare.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from examples.demo import ADAPTERS, BASES, running_server

PROJECT = Path(__file__).resolve().parents[1]
README = PROJECT / "README.md"
ADDRESS = "http://127.0.0.1:8000"
"""Where `make serve` listens, as the README spells it."""

_EXAMPLE = re.compile(
    r"<!-- run -->\n```(?P<language>\w+)\n(?P<code>.*?)```\n"
    r"[^`]*```\w+\n(?P<output>.*?)```\n",
    re.DOTALL,
)


@dataclass(frozen=True)
class Example:
    """A block of the README, and what it says that the block prints."""

    language: str
    code: str
    output: str


def examples(text: str) -> list[Example]:
    """The runnable blocks of the README's text, in order."""
    return [Example(m["language"], m["code"], m["output"]) for m in _EXAMPLE.finditer(text)]


def run(example: Example, url: str) -> str:
    """What the block prints when the server is at `url`. Raises CalledProcessError if it fails."""
    interpreter = {"bash": ["bash", "-euc"], "python": [sys.executable, "-c"]}[example.language]
    command = [*interpreter, example.code.replace(ADDRESS, url)]
    # The README's commands mean those of the project's environment.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=PROJECT,
        env=os.environ | {"PATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
    )
    return readable(done.stdout).replace(url, ADDRESS)


def readable(output: str) -> str:
    """JSON indented, with lists of plain values on one line; anything else as it is."""
    try:
        indented = json.dumps(json.loads(output), indent=2, ensure_ascii=False)
    except ValueError:
        return output.rstrip("\n") + "\n"
    return re.sub(r"\[([^\[\]{}]*)\]", lambda m: f"[{' '.join(m[1].split())}]", indented) + "\n"


def refreshed(text: str, url: str) -> str:
    """The README's text with fresh output under every example."""

    def replace(match: re.Match[str]) -> str:
        output = run(Example(match["language"], match["code"], ""), url)
        start = match.start("output") - match.start()
        return match[0][:start] + output + "```\n"

    return _EXAMPLE.sub(replace, text)


def main() -> None:
    """Rewrite the pages."""
    with running_server(BASES, ADAPTERS) as url:
        for page in [Path(page) for page in sys.argv[1:]] or [README]:
            page.write_text(refreshed(page.read_text(encoding="utf-8"), url), encoding="utf-8")


if __name__ == "__main__":
    main()
