"""Mixed-adapter LoRA classification: this engine against PEFT's `adapter_names` on padded batches.

    python -m benchmarks.bench_lora_classification [--rounds 7] [--shapes …] [--requests …] [--adapters …]

Both classify the same sentences under the same choice of adapters (Zipf). PEFT's mixed batches do not
take RoBERTa's classification head, so its arm stops at the last hidden states and is spared the heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import RobertaModel

from benchmarks.common import (
    DTYPES,
    Contestant,
    OwnEngine,
    Setting,
    compare_all,
    measure,
    random_adapter,
    report,
    sentences,
    zipf,
)


def peft_contestant(
    folder: Path, dtype: str, inputs: Sequence[Sequence[int]], chosen: Sequence[int], count: int
) -> Contestant:
    """`count` rank-8 adapters on query and value, one padded batch."""
    base = RobertaModel.from_pretrained(folder, dtype=DTYPES[dtype], add_pooling_layer=False)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name="0", autocast_adapter_dtype=False)
    for number in range(1, count):
        model.add_adapter(str(number), config, autocast_adapter_dtype=False)
    model.eval()
    longest = max(map(len, inputs))
    padded = torch.tensor([list(ids) + [1] * (longest - len(ids)) for ids in inputs])
    mask = (padded != 1).long()
    names = [str(number) for number in chosen]

    def run() -> object:
        with torch.inference_mode():
            return model(input_ids=padded, attention_mask=mask, adapter_names=names)

    return run


def compare(setting: Setting, scratch: Path) -> None:
    folder, count = setting.base(scratch), setting.adapters
    inputs = sentences(setting.requests, seed=1)
    chosen = zipf(setting.requests, count, seed=2)
    contestants: dict[str, Contestant] = {}
    for dtype in DTYPES:
        engine = OwnEngine(folder, dtype)
        adapters = [random_adapter(engine.model.spec, seed=n) for n in range(count)]
        contestants[f"ours {dtype}"] = engine.contestant(inputs, [adapters[n] for n in chosen])
        contestants[f"ours {dtype}, bare base"] = engine.bare(inputs)
        contestants[f"peft {dtype}"] = peft_contestant(folder, dtype, inputs, chosen, count)
    medians = measure(contestants, setting.rounds)
    best = {who: min(medians[f"{who} {dtype}"] for dtype in DTYPES) for who in ("ours", "peft")}
    ratios = {
        f"peft / ours, {dtype}": medians[f"peft {dtype}"] / medians[f"ours {dtype}"] for dtype in DTYPES
    }
    ratios["peft / ours, each at its best"] = best["peft"] / best["ours"]
    for dtype in DTYPES:
        ratios[f"ours / bare base, {dtype}"] = medians[f"ours {dtype}"] / medians[f"ours {dtype}, bare base"]
    tokens = sum(map(len, inputs))
    distinct = len(set(chosen))
    title = f"{setting.shape}: {setting.requests} sentences, {tokens} tokens, {distinct} of {count} adapters"
    report(title, medians, ratios)


if __name__ == "__main__":
    compare_all(__doc__ or "", compare, requests=(64,))
