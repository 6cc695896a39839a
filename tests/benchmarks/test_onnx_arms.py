"""ONNX Runtime gets our layers and low-rank updates, and makes the same of the same rows."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
import torch

from benchmarks.bench_onnx import BASES, THEIRS, figures_of
from benchmarks.onnx_arms import SPINNING, Arms, Load, cosines, ours, side_by_side, theirs
from molex import MolexModel
from tests.molex.native.kernels import needs_kernels

FAMILIES = ("llama", "roberta")


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_of_the_graph_are_those_of_query_and_value(family, base_folder):
    model = MolexModel.from_pretrained(base_folder(family))
    lora = Load.of(model, {}).lora
    query, key, value = model.backbone.family.projections
    arrays = side_by_side(model, lora)
    of_query, of_value = lora.updates[3, query], lora.updates[3, value]
    no_key = torch.zeros(model.spec.modules[key][1], model.spec.hidden_size)
    expected = [update.scaling * update.b @ update.a for update in (of_query, of_value)]
    expected.insert(1, no_key)
    np.testing.assert_allclose(arrays["a3"] @ arrays["b3"], torch.cat(expected).T, atol=1e-6)


def test_cosines_are_of_rows():
    rows = np.array([[3.0, 0.0], [0.0, -2.0], [1.0, 1.0]])
    assert cosines(rows, np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])) == pytest.approx([1, -1, 0.5**0.5])


def test_figures_take_the_faster_of_the_ways_to_wait():
    base = BASES["encoder"]
    medians = {ours(precision): 0.36 for precision in base.precisions}
    for variant in ("float32", *THEIRS["8 bits"]):
        medians |= dict(zip([theirs(variant, waits) for waits in SPINNING], (0.9, 0.72), strict=True))
    medians[theirs("int8", "sleep")] = 0.18
    figures = figures_of("encoder", base, 12, medians)
    assert [round(figure.value, 2) for figure in figures] == [2, 2, 0.5, 0.5]
    first, *_ = figures
    assert first.what == "ONNX Runtime in float32 / ours in float32, encoder"
    assert first.measured == pytest.approx(
        {"ours float32, µs a layer": 1e4, "ONNX Runtime float32, threads spin, µs a layer": 2e4}
    )


@needs_kernels
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("precision", "variant"), [("float32", "float32"), ("8 bits", "int8")])
def test_both_sides_make_the_same_of_the_same_inputs(family, precision, variant, base_folder, tmp_path):
    with ExitStack() as stack:
        arms = Arms(base_folder(family), {"one": 1, "many": 3}, 2, tmp_path)
        arms.add_ours("float32")
        arms.add_theirs(stack, precision, variant, "sleep")
        for contestants in arms.contestants.values():
            assert list(contestants) == [ours("float32"), theirs(variant, "sleep")]
            for contestant in contestants.values():
                contestant()
