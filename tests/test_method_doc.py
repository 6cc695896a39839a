"""docs/method.md names, for each claim, a test that exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
CLAIMS = [
    line
    for line in (ROOT / "docs" / "method.md").read_text().splitlines()
    if line.startswith("| ") and "`tests/" in line
]


def test_every_claim_names_a_test_that_exists():
    assert len(CLAIMS) >= 10
    for claim in CLAIMS:
        (path,) = re.findall(r"`(tests/[\w/]+\.py)`", claim)
        source = (ROOT / path).read_text()
        for name in re.findall(r"`(test_\w+)`", claim):
            assert f"def {name}(" in source, claim
