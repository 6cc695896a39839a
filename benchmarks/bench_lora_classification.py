"""Mixed-adapter LoRA classification: this engine against PEFT's `adapter_names` on padded batches.

    python -m benchmarks.bench_lora_classification [--rounds 7] [--shapes …] [--requests …] [--adapters …]

Both classify the same sentences under the same choice of adapters (Zipf), in batches of each of the sizes
`--requests`; there are as many sentences as the largest takes. PEFT's mixed batches do not take RoBERTa's
classification head, so its arm stops at the last hidden states and is spared the heads.

The figure P1 lets both choose: the time of PEFT in its best precision and size of batches over ours in ours,
once of all that we have, 8-bit weights among them, and once of the two that PEFT has too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from peft import LoraConfig, get_peft_model
from transformers import RobertaModel

from benchmarks.common import (
    DTYPES,
    FAST_DTYPES,
    OWN_PRECISIONS,
    Contestant,
    OwnEngine,
    Setting,
    compare_all,
    fastest,
    in_batches,
    measure,
    milliseconds,
    random_adapter,
    report,
    sentences,
    zipf,
)
from benchmarks.figures import Figure
from molex.adapter import Adapter

REQUESTS = (32, 64, 128)
HELD_ADAPTERS = 32
BOUNDS = {"demo-encoder": 5, "roberta-base-shape": 3}


class Engine(Protocol):
    def contestant(self, inputs: Sequence[Sequence[int]], chosen: Sequence[int]) -> Contestant:
        """One batch; `chosen` are the numbers of its adapters."""


class Peft:
    """`count` rank-8 adapters on query and value."""

    def __init__(self, folder: Path, dtype: str, count: int) -> None:
        base = RobertaModel.from_pretrained(folder, dtype=DTYPES[dtype], add_pooling_layer=False)
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], init_lora_weights=False)
        self.model = get_peft_model(base, config, adapter_name="0", autocast_adapter_dtype=False)
        for number in range(1, count):
            self.model.add_adapter(str(number), config, autocast_adapter_dtype=False)
        self.model.eval()

    def contestant(self, inputs: Sequence[Sequence[int]], chosen: Sequence[int]) -> Contestant:
        longest = max(map(len, inputs))
        padded = torch.tensor([list(ids) + [1] * (longest - len(ids)) for ids in inputs])
        mask = (padded != 1).long()
        names = [str(number) for number in chosen]

        def run() -> object:
            with torch.inference_mode():
                return self.model(input_ids=padded, attention_mask=mask, adapter_names=names)

        return run


class Ours:
    """The engine with numbered adapters."""

    def __init__(self, engine: OwnEngine, adapters: Sequence[Adapter]) -> None:
        self.engine = engine
        self.adapters = adapters

    def contestant(self, inputs: Sequence[Sequence[int]], chosen: Sequence[int]) -> Contestant:
        return self.engine.contestant(inputs, [self.adapters[n] for n in chosen])


def compare(setting: Setting) -> list[Figure]:
    count, largest = setting.adapters, max(setting.requests)
    inputs = sentences(largest, seed=1)
    chosen = zipf(largest, count, seed=2)
    contestants: dict[str, Contestant] = {}
    for precision in OWN_PRECISIONS:
        engine = OwnEngine(setting.folder, precision)
        adapters = [random_adapter(engine.model.spec, seed=n) for n in range(count)]
        arms: dict[str, Engine] = {"ours": Ours(engine, adapters)}
        if precision in FAST_DTYPES:
            arms["peft"] = Peft(setting.folder, precision, count)
        for (who, arm), size in ((item, size) for item in arms.items() for size in setting.requests):
            contestants[f"{who} {precision}, batches of {size}"] = in_batches(
                arm.contestant, inputs, chosen, size
            )
        contestants[f"bare base {precision}, batches of {largest}"] = engine.bare(inputs)
    medians = measure(contestants, setting.rounds)
    ours = [name for name in medians if name.startswith("ours")]
    peft = fastest(medians, [name for name in medians if name.startswith("peft")])
    best = {
        "each at its best": fastest(medians, ours),
        "ours in 16 or 32 bits": fastest(medians, [name for name in ours if "int8" not in name]),
    }
    ratios = {how: medians[peft] / medians[name] for how, name in best.items()}
    described = f"{setting.shape}: {largest} sentences, {len(set(chosen))} of {count} adapters"
    print_table(f"{described}, {sum(map(len, inputs))} tokens", medians, setting.requests, ratios)
    if count != HELD_ADAPTERS:
        return []
    return [
        Figure(
            "P1",
            f"PEFT / ours, {how}, {described}",
            ratios[how],
            BOUNDS[setting.shape] if how == "each at its best" else None,
            at_least=True,
            unit="x",
            measured=milliseconds(medians, [peft, name]),
        )
        for how, name in best.items()
    ]


def print_table(
    title: str, medians: dict[str, float], sizes: Sequence[int], best: Mapping[str, float]
) -> None:
    ratios = {
        f"peft / ours, {arm}": medians[f"peft {arm}"] / medians[f"ours {arm}"]
        for arm in (f"{dtype}, batches of {size}" for dtype in FAST_DTYPES for size in sizes)
    }
    ratios |= {f"peft / ours, {how}": ratio for how, ratio in best.items()}
    for arm in (f"{precision}, batches of {max(sizes)}" for precision in OWN_PRECISIONS):
        ratios[f"ours / bare base, {arm}"] = medians[f"ours {arm}"] / medians[f"bare base {arm}"]
    report(title, medians, ratios)


if __name__ == "__main__":
    compare_all(__doc__, "bench_lora_classification", compare, REQUESTS)
