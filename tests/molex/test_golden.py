"""The packed forward against the official code's own routes and logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from molex import MolexModel
from molex.convert import convert

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "molex-official"
VARIANTS = sorted(p.name for p in GOLDEN.iterdir()) if GOLDEN.is_dir() else []

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="../shared/golden is not here")

# ../shared/golden/README.md argues for both: float64 differs by the order of sums alone, while these random
# GPT-2 models amplify the rounding of float32.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}


def test_all_nine_variants_are_there():
    assert len(VARIANTS) == 9


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_routes_and_logits_equal_the_official_ones(variant, dtype, tmp_path):
    convert(GOLDEN / variant, tmp_path / "adapter", tmp_path / "base")
    model = MolexModel.from_pretrained(tmp_path / "base", dtype=dtype)
    model.load_adapter("official", tmp_path / "adapter")
    cases = load_file(GOLDEN / variant / "cases.safetensors")
    count = sum(name.endswith(".input_ids") for name in cases)

    output = model([cases[f"{i}.input_ids"].tolist() for i in range(count)], ["official"] * count)

    for i in range(count):
        assert output.routes[i] == cases[f"{i}.routes"].tolist()
        expected = cases[f"{i}.logits"]
        difference = (output.logits[i].double().reshape(expected.shape) - expected).abs().max()
        assert difference <= TOLERANCE[dtype] * expected.abs().max()
