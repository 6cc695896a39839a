"""What a routed branch in bfloat16 changes: labels and probabilities on real test sets.

    python -m benchmarks.bench_precision [--output DIR]

The own branch is in float32 and in bfloat16. With the first, routed layers are once in float32 and once in
bfloat16, and labels and probabilities of the two are compared; the second is compared with all of it in
float32. How much faster it is, `benchmarks.bench_http_ratio` measures. Needs ../shared/data.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import DEMO_ENCODER, behave_as_the_server, command_line
from benchmarks.figures import Figure, save
from molex import MolexModel, Row
from molex.tokenizer import load_tokenizer
from molex.train.data import read_labelled

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
TASKS = ("sst2", "trec")
TEXTS_PER_BATCH = 64
EQUAL_LABELS = 99.9
PRECISIONS = {
    "float32": (torch.float32, torch.float32),
    "float32, routed bfloat16": (torch.float32, torch.bfloat16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
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


def compare(exact: Tensor, reduced: Tensor, task: str, precision: str) -> Figure:
    equal = (exact.argmax(-1) == reduced.argmax(-1)).double().mean().item() * 100
    change = (exact - reduced).abs().max().item()
    what = f"labels equal to those in float32, {task} test set, {precision}"
    measured = {"texts": float(len(exact)), "largest change of a probability": change}
    bound = EQUAL_LABELS if "routed" in precision else None
    return Figure("P3", what, equal, bound, at_least=True, unit="%", measured=measured)


def figures() -> Iterator[Figure]:
    results: dict[tuple[str, str], Tensor] = {}
    for precision, (dtype, routed_dtype) in PRECISIONS.items():
        model = MolexModel.from_pretrained(DEMO_ENCODER, dtype=dtype, routed_dtype=routed_dtype)
        model.prepack()
        for task in TASKS:
            results[task, precision] = probabilities(model, task)
    for (task, precision), found in results.items():
        if precision != "float32":
            yield compare(results[task, "float32"], found, task, precision)


if __name__ == "__main__":
    arguments = command_line(__doc__, rounds=1).parse_args()
    behave_as_the_server()
    save(list(figures()), "bench_precision", arguments.output)
