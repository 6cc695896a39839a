"""The pages of examples do what they say: their blocks run on the demo bases and print what is shown."""

from __future__ import annotations

import pytest

from scripts.readme_output import PROJECT, Example, examples, run

PAGES = {"client.md": 5, "openai.md": 7}
"""In docs/, with how many blocks each has."""
EXAMPLES = {page: examples((PROJECT / "docs" / page).read_text(encoding="utf-8")) for page in PAGES}


@pytest.mark.parametrize(
    "example",
    [example for page in PAGES for example in EXAMPLES[page]],
    ids=lambda example: example.output.split("\n")[0][:40],
)
def test_a_block_prints_what_the_page_shows(example: Example, demo_url):
    assert run(example, demo_url).strip() == example.output.strip()


def test_every_topic_has_a_block():
    assert {page: len(found) for page, found in EXAMPLES.items()} == PAGES
