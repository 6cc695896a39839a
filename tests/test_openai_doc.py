"""docs/openai.md does what it says: its blocks run against the demo bases and print what it shows."""

from __future__ import annotations

import pytest

from examples.demo import ADAPTERS, BASES, running_server
from scripts.readme_output import PROJECT, Example, examples, run

EXAMPLES = examples((PROJECT / "docs" / "openai.md").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def url():
    if missing := [folder for folder in BASES.values() if not (PROJECT / folder).is_dir()]:
        pytest.skip(f"{', '.join(missing)}: not there; `make models` prepares them")
    with running_server(BASES, ADAPTERS) as address:
        yield address


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.output.split("\n")[0][:40])
def test_a_block_prints_what_the_page_shows(example: Example, url):
    assert run(example, url).strip() == example.output.strip()


def test_every_topic_has_a_block():
    assert len(EXAMPLES) == 7
