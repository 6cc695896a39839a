"""What MoLEx costs a caller of the server: open-loop load on LoRA and MoLEx arms in the same precision.

    python -m benchmarks.bench_http_ratio [--rounds 4] [--seconds 5] [--output DIR]

Six servers of the demo encoder run side by side, and one of them has load at a time: in float32 and in
bfloat16, the same with routed layers whose weights have 8 bits, and a base into which the LoRA adapter was
merged. Requests arrive as a Poisson process, at the same rate on all arms: at shares of what the
slowest arm answers at most. The base arm asks for embeddings.

With `--output` the load test's reports are left there, a page for each precision.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.common import DEMO_ENCODER, PROJECT, command_line
from benchmarks.figures import Figure, save
from benchmarks.served import BASE, own_server
from loadtests.config import Arm, Config
from loadtests.latency import PERCENTILES
from loadtests.measure import measure
from loadtests.report import Report, write_report
from loadtests.texts import read_texts
from molex.merge import merge

ADAPTERS = PROJECT / "examples" / "adapters"
TEXTS = PROJECT / "loadtests" / "demo_texts.txt"
SHARES = [0.1, 0.3, 0.6, 0.8]
MEDIAN = PERCENTILES.index(50)
SERVERS = {
    "float32": ["--precision", "fp32"],
    "float32, routed int8": ["--precision", "fp32", "--routed-precision", "int8"],
    "bfloat16": ["--precision", "bf16"],
    "bfloat16, routed int8": ["--precision", "bf16", "--routed-precision", "int8"],
}
EXACT, REDUCED = "MoLEx", "MoLEx, routed int8"
# By what MoLEx is and the precision of the own branch: the figure of docs/performance.md and its bound.
BOUNDS = {
    (EXACT, "float32"): ("P2", 1.85),
    (EXACT, "bfloat16"): ("P2", 1.85),
    (REDUCED, "float32"): ("P3", 1.3),
    (REDUCED, "bfloat16"): ("P3", 1.6),
}


def experiments(urls: dict[str, str], rounds: int, seconds: float) -> Iterator[tuple[str, Config]]:
    """The arms that are compared, by the precision of the own branch."""
    exact = {"LoRA": "sst2-lora", EXACT: "sst2-molex"}
    for precision in ("float32", "bfloat16"):
        arms = [classify(name, urls[precision], model) for name, model in exact.items()]
        arms.append(classify(REDUCED, urls[f"{precision}, routed int8"], "sst2-molex"))
        arms.append(classify("merged LoRA", urls[merged(precision)], "sst2-merged"))
        arms.append(Arm(name="base", url=urls[precision], dialect="openai-embeddings", models=[BASE]))
        yield precision, single_sentences(arms, SHARES, rounds, seconds)


def single_sentences(arms: list[Arm], shares: list[float], rounds: int, seconds: float) -> Config:
    """Sentences one by one, in blocks of `seconds`, at shares of what the slowest arm answers."""
    return Config(
        arms=arms,
        texts=TEXTS.name,
        popularity="identical",
        shares=shares,
        rounds=rounds,
        block_seconds=seconds,
        warmup_seconds=seconds,
    )


def merged(server: str) -> str:
    """The name of the server beside another whose base has the LoRA adapter's updates in its weights."""
    return f"{server}, merged"


def start_servers(stack: ExitStack, folder: Path) -> dict[str, str]:
    """The URL of each server. They write into `folder`."""
    base, heads = folder / "base", folder / "heads"
    merge(DEMO_ENCODER, ADAPTERS / "sst2-lora", base, heads / "sst2-merged")
    served = {name: (DEMO_ENCODER, ADAPTERS, options) for name, options in SERVERS.items()}
    served |= {merged(name): (base, heads, SERVERS[name]) for name in ("float32", "bfloat16")}
    return {
        name: stack.enter_context(own_server(model, adapters, folder / f"{name}.log", *options))
        for name, (model, adapters, options) in served.items()
    }


def classify(name: str, url: str, model: str) -> Arm:
    return Arm(name=name, url=url, dialect="molex-classify", models=[model])


def figures(precision: str, report: Report) -> Iterator[Figure]:
    """Each MoLEx arm over LoRA at each load: the ratio of median latencies."""
    summaries = {(one.arm, one.rate): one for one in report.summaries}
    for ratio in report.ratios:
        if ratio.metric != "total" or ratio.percentile != 50:
            continue
        if (ratio.over, precision) not in BOUNDS:
            continue
        key, bound = BOUNDS[ratio.over, precision]
        share = ratio.rate / min(report.run.capacity.values())
        measured = {"95 % from": ratio.low, "to": ratio.high}
        for arm in (ratio.over, ratio.under):
            summary = summaries[arm, ratio.rate]
            for what, seconds in {"p50": summary.latency["total"], **summary.stages}.items():
                measured[f"{arm}, {what}, ms"] = seconds[MEDIAN] * 1e3
        load = f"{ratio.rate:.0f} requests/s ({share:.0%} of capacity)"
        what = f"{ratio.over} / LoRA, own branch {precision}, {load}"
        yield Figure(key, what, ratio.estimate, bound, at_least=False, unit="x", measured=measured)


def run(rounds: int, seconds: float, output: Path | None) -> list[Figure]:
    found: list[Figure] = []
    texts: Sequence[str] = read_texts(TEXTS)
    with ExitStack() as stack:
        urls = start_servers(stack, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        for precision, config in experiments(urls, rounds, seconds):
            report = measure(config, texts, f"Demo encoder, own branch in {precision}", print)
            found += figures(precision, report)
            if output is not None:
                write_report(report, output / precision)
    return found


if __name__ == "__main__":
    parser = command_line(__doc__, rounds=4)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a block")
    arguments = parser.parse_args()
    results = run(arguments.rounds, arguments.seconds, arguments.output)
    save(results, "bench_http_ratio", arguments.output)
