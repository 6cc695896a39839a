"""What the token budget of a pass changes: rates and latencies of servers that differ in it alone.

    python -m benchmarks.bench_token_budget [--rounds 4] [--seconds 4] [--budgets 64 256 1024] [--output DIR]

Servers of the demo encoder in bfloat16, one for each `--max-batch-tokens`, the default among them. One has
load at a time, single sentences for a MoLEx adapter: as many as it answers to 64 callers, and then a Poisson
process at the same shares of what the slowest answers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

from benchmarks.bench_http_ratio import ADAPTERS, TEXTS, classify, single_sentences
from benchmarks.common import DEMO_ENCODER, command_line
from benchmarks.figures import Figure, save
from benchmarks.served import own_server
from loadtests.measure import measure
from loadtests.report import Report
from loadtests.texts import read_texts
from server.settings import Settings

DEFAULT: int = Settings.model_fields["max_batch_tokens"].default
SHARES = [0.5, 0.8, 0.95]
CALLERS = 64


def compare(urls: Mapping[int, str], rounds: int, seconds: float) -> Report:
    """The default is what the others are compared with."""
    budgets = sorted(urls, key=lambda budget: budget != DEFAULT)
    arms = [classify(str(budget), urls[budget], "sst2-molex") for budget in budgets]
    config = single_sentences(arms, SHARES, rounds, seconds).model_copy(update={"num_clients": CALLERS})
    return measure(config, read_texts(TEXTS), "Token budgets", print)


def figures(report: Report) -> Iterator[Figure]:
    capacity = report.run.capacity
    for budget, rate in capacity.items():
        if budget != str(DEFAULT):
            what = f"requests/s to {CALLERS} callers, {budget} tokens / {DEFAULT}"
            rates = {budget: rate, str(DEFAULT): capacity[str(DEFAULT)]}
            yield Figure("budget", what, rate / capacity[str(DEFAULT)], None, True, "x", rates)
    for ratio in report.ratios:
        if ratio.metric == "total" and ratio.percentile in (50, 99):
            share = ratio.rate / min(capacity.values())
            what = f"p{ratio.percentile}, {ratio.over} tokens / {DEFAULT}, {share:.0%} of capacity"
            interval = {"95 % from": ratio.low, "to": ratio.high}
            yield Figure("budget", what, ratio.estimate, None, False, "x", interval)


def main() -> None:
    parser = command_line(__doc__, rounds=4)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a block")
    parser.add_argument("--budgets", type=int, nargs="+", default=(64, 256, 1024), help="beside the default")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        urls = {}
        for budget in {DEFAULT, *options.budgets}:
            server = ["--precision", "bf16", "--max-batch-tokens", str(budget)]
            log = folder / f"{budget}.log"
            urls[budget] = stack.enter_context(own_server(DEMO_ENCODER, ADAPTERS, log, *server))
        report = compare(urls, options.rounds, options.seconds)
    save(list(figures(report)), "bench_token_budget", options.output)


if __name__ == "__main__":
    main()
