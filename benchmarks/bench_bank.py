"""Where batches read low-rank factors: in a bank, in a stack of their own, or where each adapter keeps them.

    python -m benchmarks.bench_bank [--rounds 7] [--shapes …] [--requests …] [--adapters …]

PyTorch alone runs the layers twice: each batch stacks the factors of its adapters, or reads them in the
slots of a bank. The kernels need no stacks: they read the factors where each adapter keeps them, and then
where they lie in a bank. Every batch has other adapters (Zipf) than the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from benchmarks.common import (
    Contestant,
    Setting,
    compare_all,
    in_turn,
    measure,
    milliseconds,
    random_adapter,
    report,
    sentences,
    zipf,
)
from benchmarks.figures import Figure
from molex import MolexModel, Row
from molex.adapter import Adapter
from molex.bank import AdapterBank
from molex.layers import StockLayers
from molex.lora import BatchLora, LowRank

BATCHES = 8
MAX_BANK_BYTES = 268_435_456


def on_pytorch(setting: Setting) -> MolexModel:
    model = MolexModel.from_pretrained(setting.folder)
    assert isinstance(model.backbone.layers, StockLayers)
    model.backbone.layers.prepack()
    return model


def on_kernels(setting: Setting) -> MolexModel:
    model = MolexModel.from_pretrained(setting.folder)
    model.prepack()
    return model


def banked(model: MolexModel, adapters: Sequence[Adapter]) -> list[Adapter]:
    """The same adapters with their factors in the slots of a bank."""
    bank = AdapterBank(MAX_BANK_BYTES, model.dtype, model.device)
    batch = BatchLora([adapter.lora for adapter in adapters])
    assert bank.serve(batch)
    moved = []
    for member, adapter in enumerate(adapters):
        updates = {}
        for site, update in adapter.lora.updates.items():
            stack, place = batch.stack(site), batch.stack(site).places[member]
            a, b = stack.a[place.start : place.stop], stack.b[place.start : place.stop].T
            updates[site] = LowRank(a, b, update.scaling)
        moved.append(replace(adapter, lora=replace(adapter.lora, updates=updates)))
    return moved


def in_batches(
    model: MolexModel, adapters: Sequence[Adapter], size: int, bank: AdapterBank | None = None
) -> Contestant:
    inputs, chosen = sentences(size * BATCHES, seed=1), zipf(size * BATCHES, len(adapters), seed=2)
    rows = [Row(ids, adapters[n]) for ids, n in zip(inputs, chosen, strict=True)]

    def batch(rows: Sequence[Row]) -> Callable[[], object]:
        def run() -> object:
            model.bank = bank
            with torch.inference_mode():
                return model.run(rows)

        return run

    return in_turn([batch(rows[start : start + size]) for start in range(0, len(rows), size)])


def compare(setting: Setting) -> list[Figure]:
    pytorch, kernels = on_pytorch(setting), on_kernels(setting)
    adapters = [random_adapter(pytorch.spec, seed=n) for n in range(setting.adapters)]
    moved = banked(kernels, adapters)
    figures = []
    for size in setting.requests:
        bank = AdapterBank(MAX_BANK_BYTES, pytorch.dtype, pytorch.device)
        contestants: dict[str, Contestant] = {
            "PyTorch, a stack each": in_batches(pytorch, adapters, size),
            "PyTorch, the bank": in_batches(pytorch, adapters, size, bank),
            "kernels, in place": in_batches(kernels, adapters, size),
            "kernels, the bank": in_batches(kernels, moved, size),
        }
        medians = measure(contestants, setting.rounds)
        title = f"{setting.shape}: {BATCHES} batches of {size} requests, {setting.adapters} adapters"
        pairs = [tuple(contestants)[:2], tuple(contestants)[2:]]
        ratios = {f"{before} / the bank": medians[before] / medians[after] for before, after in pairs}
        report(title, medians, ratios)
        figures += [
            Figure(
                "bank",
                f"{what}, {title}",
                ratio,
                bound=None,
                at_least=True,
                unit="x",
                measured=milliseconds(medians, pair),
            )
            for (what, ratio), pair in zip(ratios.items(), pairs, strict=True)
        ]
    return figures


if __name__ == "__main__":
    compare_all(__doc__, "bench_bank", compare, (1, 8, 32))
