"""Percentiles, rates and ratios of results that are known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.client import Outcome, Result
from loadtests.experiment import Block, Run
from loadtests.latency import PERCENTILES, percentiles
from loadtests.ratios import compare_arms, ratio_intervals
from loadtests.summary import summarise


def result(due, took, outcome=Outcome.OK, status: int | None = 200, pieces=()):
    return Result("model", due, due + 0.01, due + took, outcome, status, pieces)


def rng(seed=0):
    return np.random.default_rng(seed)


@given(st.lists(st.floats(0, 1e6) | st.just(math.inf), min_size=1, max_size=300))
def test_percentiles_are_values_of_the_least_rank_that_covers_the_share(values):
    for percentile, value in zip(PERCENTILES, percentiles(np.array(values)), strict=True):
        assert value in values
        assert sum(v <= value for v in values) * 100 >= percentile * len(values)
        assert sum(v < value for v in values) * 100 < percentile * len(values)


def test_no_values_have_no_percentiles():
    assert np.isnan(percentiles(np.array([]))).all()


def test_a_summary_counts_everything_once():
    results = [result(n / 100, 0.1) for n in range(96)]
    results += [result(0.97, 0.2, Outcome.HTTP_ERROR, 503), result(0.98, 0.2, Outcome.HTTP_ERROR, 429)]
    results += [result(0.98, 3.02, Outcome.TIMEOUT, None), result(0.99, 0, Outcome.TRANSPORT_ERROR, None)]
    run = Run(["one"], [100], {}, [Block(n, 100, "one", 1.0, results) for n in range(2)])
    (summary,) = summarise(run)
    assert summary.outcomes == {
        "ok": 192,
        "http error": 4,
        "timeout": 2,
        "transport error": 2,
        "bad answer": 0,
    }
    assert summary.statuses == {200: 192, 503: 2, 429: 2}
    assert summary.num_failed == 8
    assert summary.achieved_rate == pytest.approx(100)
    assert summary.throughput == pytest.approx(96 / 4)  # the last request of a block ends after 4 s
    assert summary.lateness == pytest.approx(0.01)
    assert summary.latency == {"total": pytest.approx([0.1, 0.1, 0.1, math.inf])}


def test_what_servers_tell_is_summarised_by_stage():
    told = [replace(result(n / 10, 0.1), stages={"in pass": n / 100}) for n in range(1, 10)]
    (summary,) = summarise(Run(["one"], [10], {}, [Block(0, 10, "one", 1.0, [*told, result(1, 0.1)])]))
    assert summary.stages == {"in pass": pytest.approx([0.05, 0.09, 0.09, 0.09])}


def test_an_arm_that_answers_nothing_has_no_latency():
    failed = [result(0, 0.1, Outcome.HTTP_ERROR, 500)]
    blocks = [Block(n, 1, arm, 1.0, failed) for n in range(2) for arm in ("one", "two")]
    run = Run(["one", "two"], [1], {}, blocks)
    assert [summary.latency for summary in summarise(run)] == [{}, {}]
    assert compare_arms(run, seed=0) == []


def test_an_empty_block_is_no_error():
    blocks = [Block(0, 1, "one", 1.0, []), Block(1, 1, "one", 1.0, [result(0.5, 0.25)])]
    (summary,) = summarise(Run(["one"], [1], {}, blocks))
    assert summary.latency["total"] == pytest.approx([0.25] * 4)
    (empty,) = summarise(Run(["one"], [1], {}, blocks[:1]))
    assert (empty.throughput, empty.latency) == (0, {})


def test_streams_are_summarised_from_the_due_time():
    results = [result(1.0, 0.5, pieces=(1.2, 1.3, 1.5))] * 3 + [result(1.0, 9, Outcome.TIMEOUT, 200)]
    (summary,) = summarise(Run(["one"], [4], {}, [Block(0, 4, "one", 1.0, results)]))
    assert summary.latency["first token"] == pytest.approx([0.2, math.inf, math.inf, math.inf])
    assert summary.latency["between tokens"] == pytest.approx([0.1, 0.2, 0.2, 0.2])


def noisy_blocks(generator, factor, moods):
    """Ten blocks of 60 latencies. `moods`: the slowness of the machine during each block."""
    return [factor * mood * generator.lognormal(-3, 0.3, 60) for mood in moods]


def test_interval_covers_the_known_ratio():
    """Pairs of blocks share the machine's mood, which differs much more than their own noise."""
    covered, widths = 0, []
    for seed in range(60):
        generator = rng(seed)
        moods = generator.lognormal(0, 0.5, 10)
        own = [moods * generator.lognormal(0, 0.05, 10) for _ in range(2)]
        over, under = noisy_blocks(generator, 2.0, own[0]), noisy_blocks(generator, 1.0, own[1])
        estimate, low, high = ratio_intervals(over, under, generator)[:, 0]
        assert low <= estimate <= high
        covered += low <= 2 <= high
        widths.append(high / low)
    # 95 % in theory; a percentile bootstrap of ten blocks gives somewhat less.
    assert covered >= 0.85 * 60
    assert np.median(widths) < 1.3


def test_interval_is_of_blocks_not_of_requests():
    """Blocks that differ as wholes make a wide interval, however many requests they have."""
    slow_once = [np.full(5000, 0.1)] * 4 + [np.full(5000, 0.3)] * 4
    steady = [np.full(5000, 0.1)] * 8
    estimate, low, high = ratio_intervals(slow_once, steady, rng())[:, 0]
    assert (low, high) == (pytest.approx(1), pytest.approx(3))
    assert estimate == pytest.approx(1)


def test_ratios_are_over_the_first_arm_at_each_rate():
    factors = {"base": 1.0, "lora": 1.5, "molex": 3.0}
    blocks = [
        Block(n, rate, arm, 1.0, [result(0.0, 0.1 * factor * rate)] * 20)
        for n in range(3)
        for rate in (10.0, 20.0)
        for arm, factor in factors.items()
    ]
    found = compare_arms(Run(list(factors), [10.0, 20.0], {}, blocks), seed=0)
    assert {(ratio.over, ratio.rate, ratio.percentile) for ratio in found} == {
        (arm, rate, percentile)
        for arm in ("lora", "molex")
        for rate in (10.0, 20.0)
        for percentile in PERCENTILES
    }
    for ratio in found:
        assert (ratio.under, ratio.metric) == ("base", "total")
        assert [ratio.low, ratio.estimate, ratio.high] == pytest.approx([factors[ratio.over]] * 3)


def test_ratio_to_failures_has_no_number():
    half_failed = [np.array([0.1, 0.1, np.inf])] * 3
    bounds = ratio_intervals(half_failed, [np.full(3, 0.1)] * 3, rng())
    assert bounds[:, 0] == pytest.approx(1)
    assert not np.isfinite(bounds[:, -1]).any()
