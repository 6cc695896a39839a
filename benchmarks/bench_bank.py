"""Where batches read low-rank factors: in a bank, in a stack of their own, or where each adapter keeps them.

    python -m benchmarks.bench_bank [--rounds 7] [--shapes …] [--requests …] [--adapters …]

PyTorch alone runs the layers twice: each batch stacks the factors of its adapters, or reads them in the
slots of a bank. The kernels need no stacks: they read the factors where each adapter keeps them, and then
where they lie in a bank. With many adapters every batch has others (Zipf) than the one before; with one it is
stacked but once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.common import (
    Contestant,
    OwnEngine,
    Setting,
    compare_all,
    in_batches,
    measure,
    milliseconds,
    random_adapter,
    report,
    sentences,
    zipf,
)
from benchmarks.figures import Figure
from molex import MolexModel
from molex.adapter import Adapter
from molex.bank import AdapterBank
from molex.lora import BatchLora, LowRank

BATCHES = 8
MAX_BANK_BYTES = 67_108_864
"""The server's default; there is room for all adapters."""


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


def compare(setting: Setting) -> list[Figure]:
    stacking, banking = (OwnEngine(setting.folder, "float32", kernels=False) for _ in range(2))
    banking.model.use_bank(MAX_BANK_BYTES)
    kernels = OwnEngine(setting.folder, "float32")
    adapters = [random_adapter(kernels.model.spec, seed=n) for n in range(setting.adapters)]
    moved = banked(kernels.model, adapters)
    figures = []
    for size in setting.requests:
        inputs, chosen = sentences(size * BATCHES, seed=1), zipf(size * BATCHES, len(adapters), seed=2)
        own, others = [adapters[n] for n in chosen], [moved[n] for n in chosen]
        contestants: dict[str, Contestant] = {
            "PyTorch, a stack each": in_batches(stacking.contestant, inputs, own, size),
            "PyTorch, the bank": in_batches(banking.contestant, inputs, own, size),
            "kernels, in place": in_batches(kernels.contestant, inputs, own, size),
            "kernels, the bank": in_batches(kernels.contestant, inputs, others, size),
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
