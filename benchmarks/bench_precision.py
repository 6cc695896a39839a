"""What a routed branch in fewer bits changes: labels and probabilities on real test sets.

    python -m benchmarks.bench_precision [--output DIR]

With the own branch in float32 and in bfloat16, routed layers are in that precision, in a lower one, or have
weights in 8 or 4 bits, on the kernels and on ONNX Runtime. Labels and probabilities are compared with those
where routed layers are not reduced; what is reduced everywhere, the own branch too, is compared with float32.
How much faster it is, `benchmarks.bench_http_ratio` measures. The test sets are in ../shared/data; where that
is not there, nothing is compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import DEMO_ENCODER, behave_as_the_server, command_line
from benchmarks.figures import Figure, save
from molex import MolexModel, Row
from molex.backends import Backend
from molex.native.weights import Bits
from molex.tokenizer import load_tokenizer
from molex.train.data import read_labelled

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
TASKS = ("sst2", "trec")
TEXTS_PER_BATCH = 64
EQUAL_LABELS = 99.9


@dataclass(frozen=True)
class Precision:
    """How the layers of a base run, and what that is compared with."""

    dtype: torch.dtype
    routed_dtype: torch.dtype
    against: str = "float32"
    bits: Bits | None = None
    routed_bits: Bits | None = None
    backend: Backend = "auto"


FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
PRECISIONS = {
    "float32": Precision(FLOAT32, FLOAT32),
    "float32, routed bfloat16": Precision(FLOAT32, BFLOAT16),
    "float32, routed int8": Precision(FLOAT32, FLOAT32, routed_bits=8),
    "float32, routed int4": Precision(FLOAT32, FLOAT32, routed_bits=4),
    "bfloat16": Precision(BFLOAT16, BFLOAT16),
    "bfloat16, routed int8": Precision(BFLOAT16, BFLOAT16, "bfloat16", routed_bits=8),
    "bfloat16, routed int4": Precision(BFLOAT16, BFLOAT16, "bfloat16", routed_bits=4),
    "int8": Precision(BFLOAT16, BFLOAT16, bits=8),
    "float32, ONNX Runtime": Precision(FLOAT32, FLOAT32, backend="onnx"),
    "float32, routed int8, ONNX Runtime": Precision(FLOAT32, FLOAT32, routed_bits=8, backend="onnx"),
    "float32, routed int4, ONNX Runtime": Precision(FLOAT32, FLOAT32, routed_bits=4, backend="onnx"),
    "int8, ONNX Runtime": Precision(FLOAT32, FLOAT32, bits=8, backend="onnx"),
    "int4, ONNX Runtime": Precision(FLOAT32, FLOAT32, bits=4, backend="onnx"),
}


def probabilities(model: MolexModel, task: str) -> Tensor:
    """Of each class for each text of the test set [texts, classes]."""
    adapter = model.load_adapter(task, ROOT / "examples" / "adapters" / f"{task}-molex")
    tokenizer = load_tokenizer(DEMO_ENCODER, model.spec)
    texts = [example.text for example in read_labelled(DATA / task / "test.tsv").examples]
    rows = [Row(tokenizer(text)["input_ids"], adapter) for text in texts]
    batches = [rows[first : first + TEXTS_PER_BATCH] for first in range(0, len(rows), TEXTS_PER_BATCH)]
    with torch.inference_mode():
        return torch.stack([logits.softmax(-1) for rows in batches for logits in model.run(rows).logits])


def compare(exact: Tensor, reduced: Tensor, task: str, precision: str, against: str) -> Figure:
    equal = (exact.argmax(-1) == reduced.argmax(-1)).double().mean().item() * 100
    change = (exact - reduced).abs().max().item()
    what = f"labels equal to those in {against}, {task} test set, {precision}"
    measured = {"texts": float(len(exact)), "largest change of a probability": change}
    bound = EQUAL_LABELS if "routed" in precision else None
    return Figure("P3", what, equal, bound, at_least=True, unit="%", measured=measured)


def figures() -> Iterator[Figure]:
    results: dict[tuple[str, str], Tensor] = {}
    for name, precision in PRECISIONS.items():
        model = MolexModel.from_pretrained(
            DEMO_ENCODER, dtype=precision.dtype, routed_dtype=precision.routed_dtype
        )
        model.prepack(precision.bits, precision.routed_bits, precision.backend)
        for task in TASKS:
            results[task, name] = probabilities(model, task)
    for (task, name), found in results.items():
        if name != (against := PRECISIONS[name].against):
            yield compare(results[task, against], found, task, name, against)


if __name__ == "__main__":
    arguments = command_line(__doc__, rounds=1).parse_args()
    if DATA.is_dir():
        behave_as_the_server()
        save(list(figures()), "bench_precision", arguments.output)
    else:
        print(f"nothing is compared: there are no test sets in {DATA}")
