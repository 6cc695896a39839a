"""The choices that the engine makes between ways to compute the same thing.

    python -m benchmarks.bench_kernels [--rounds 15]

Linear layers with plain and with prepacked weights, and in 8 bits; low-rank updates of many adapters with a
product for each, with one for all, and in the engine's blocks; attention request by request, padded to the
longest, and in the groups of like length that the engine makes, in float32 and bfloat16.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.common import DTYPES, FAST_DTYPES, HAS_BFLOAT16, Contestant, measure, report, sentences
from benchmarks.facts import facts
from molex.attention import packed_attention
from molex.lora import (
    OPERATIONS_PER_CALL,
    BatchLora,
    LoraWeights,
    LowRank,
    cut_into_blocks,
    low_rank_blocks,
)
from molex.packing import Packed
from molex.prepack import PrepackedLinear

SITE = (0, "query")


def ratios_to(first: str, medians: dict[str, float]) -> dict[str, float]:
    return {f"{first} / {name}": medians[first] / medians[name] for name in medians if name != first}


def linear(rounds: int, rows: int, dtype: torch.dtype) -> None:
    plain = torch.nn.Linear(768, 3072, dtype=dtype).requires_grad_(False)
    prepacked = PrepackedLinear(plain)
    x = torch.randn(1, rows, 768, dtype=dtype)
    contestants: dict[str, Contestant] = {"plain": lambda: plain(x), "prepacked": lambda: prepacked(x)}
    medians = measure(contestants, rounds)
    report(f"linear 768 → 3072, {rows} rows, {dtype}", medians, ratios_to("plain", medians))


def eight_bits(rounds: int, rows: int) -> None:
    """oneDNN's 8-bit product with a scale for each row, so that no row depends on others in its batch."""
    plain = torch.nn.Linear(768, 3072).requires_grad_(False)
    scales = plain.weight.abs().amax(dim=1) / 127
    quantized = (plain.weight / scales[:, None]).round().to(torch.int8)
    weight = torch.ops.onednn.qlinear_prepack(quantized, [rows, 768])
    zeros, bias = torch.zeros(3072, dtype=torch.int32), plain.bias.clone()
    product = torch.ops.onednn.qlinear_pointwise.default
    prepacked = PrepackedLinear(plain.to(torch.bfloat16))
    x = torch.randn(rows, 768).bfloat16()

    def of_rows(x: Tensor) -> tuple[Tensor, Tensor]:
        steps = x.abs().amax(dim=1, keepdim=True).float() / 127
        return (x / steps).round().to(torch.int8), steps

    def multiply(x: Tensor) -> Tensor:
        result: Tensor = product(
            x, 1.0, 0, weight, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return result

    def whole() -> Tensor:
        integers, steps = of_rows(x)
        return torch.addcmul(bias, multiply(integers), steps).bfloat16()

    integers = of_rows(x)[0]
    contestants: dict[str, Contestant] = {
        "bfloat16": lambda: prepacked(x),
        "8 bits, the product alone": lambda: multiply(integers),
        "8 bits": whole,
    }
    medians = measure(contestants, rounds)
    report(f"linear 768 → 3072 in 8 bits, {rows} rows", medians, ratios_to("bfloat16", medians))


def low_rank(rounds: int, adapters: int, rows_each: int) -> None:
    size, rank = 768, 8
    adapters_of = [
        LoraWeights({SITE: LowRank(torch.randn(rank, size), torch.randn(size, rank), 2.0)})
        for _ in range(adapters)
    ]
    x, y = torch.randn(adapters * rows_each, size), torch.zeros(adapters * rows_each, size)
    runs = [(n, n * rows_each, (n + 1) * rows_each) for n in range(adapters)]
    stack = BatchLora(adapters_of).stack(SITE)
    costs = {"a product each": 0, "one product": 10**12, "the engine's blocks": OPERATIONS_PER_CALL}
    contestants: dict[str, Contestant] = {
        name: partial(low_rank_blocks, y, x, stack, cut_into_blocks(runs, stack, cost))
        for name, cost in costs.items()
    }
    medians = measure(contestants, rounds)
    title = f"low rank: {adapters} adapters of rank {rank}, {rows_each} rows each"
    report(title, medians, ratios_to("a product each", medians))


def attention(rounds: int, dtype: torch.dtype) -> None:
    lengths = [len(ids) for ids in sentences(64, seed=1)]
    longest = max(lengths)
    rows = [torch.randn(sum(lengths), 12, 64).to(dtype) for _ in range(3)]
    padded = [torch.randn(len(lengths), 12, longest, 64).to(dtype) for _ in range(3)]
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None])[:, None, None]

    def alone(rows: list[Tensor]) -> Tensor:
        """Packed again, as the next layer wants it."""
        pieces = [[x.transpose(0, 1)[None] for x in tensor.split(lengths)] for tensor in rows]
        attended = [functional.scaled_dot_product_attention(q, k, v) for q, k, v in zip(*pieces, strict=True)]
        return torch.cat([x[0].transpose(0, 1) for x in attended]).to(dtype)

    contestants: dict[str, Contestant] = {
        "padded": lambda: functional.scaled_dot_product_attention(padded[0], padded[1], padded[2], mask),
        "request by request": lambda: alone(rows),
    }
    if dtype == torch.bfloat16:
        contestants["request by request, widened"] = lambda: alone([x.float() for x in rows])
    packed = Packed(lengths, [0] * len(lengths), [0] * len(lengths), causal=False, device=padded[0].device)
    heads = torch.cat(rows, dim=1)
    contestants["the engine's groups"] = lambda: packed_attention(heads, 12, packed, None, 0.125)
    medians = measure(contestants, rounds)
    title = f"attention: {len(lengths)} requests of 6 to {longest} tokens, {dtype}"
    report(title, medians, ratios_to("padded", medians))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    print(facts())
    with torch.inference_mode():
        for dtype in map(DTYPES.__getitem__, FAST_DTYPES):
            for rows in (16, 128, 1024):
                linear(rounds, rows, dtype)
            attention(rounds, dtype)
        for rows in (24, 128, 1024) if HAS_BFLOAT16 else ():
            eight_bits(rounds, rows)
        for adapters, rows_each in ((8, 1), (32, 1), (8, 20), (32, 20), (32, 90)):
            low_rank(rounds, adapters, rows_each)


if __name__ == "__main__":
    main()
