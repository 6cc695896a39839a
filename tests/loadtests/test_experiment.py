"""Experiments: the order of blocks, equal loads for all arms, capacity, what stops them."""

from __future__ import annotations

import asyncio

import pytest

from loadtests.errors import LoadTestError
from loadtests.experiment import block_order, plan_block, run_experiment
from loadtests.summary import summarise

TEXTS = ["one", "two", "three"]


def run(config):
    lines: list[str] = []
    return asyncio.run(run_experiment(config, TEXTS, lines.append)), lines


def test_blocks_of_a_pair_are_neighbours_in_random_order(experiment):
    config = experiment({"a": ["0ms"], "b": ["1ms"]}, rates=[10.0, 20.0, 30.0], rounds=20, seed=3)
    order = [(round_, rate, arm.name) for round_, rate, arm in block_order(config, [10.0, 20.0, 30.0])]
    assert len(set(order)) == len(order) == 20 * 3 * 2
    pairs = list(zip(order[::2], order[1::2], strict=True))
    assert all(one[:2] == other[:2] for one, other in pairs)
    assert [round_ for round_, *_ in order] == sorted(round_ for round_, *_ in order)
    assert 15 < sum(one[2] == "a" for one, _ in pairs) < 45
    assert order == [(r, rate, arm.name) for r, rate, arm in block_order(config, [10.0, 20.0, 30.0])]
    assert len({tuple(rate for _, rate, _ in order[n : n + 6 : 2]) for n in range(0, 120, 6)}) > 3


def test_arms_get_the_same_requests_and_rounds_different_ones(experiment):
    config = experiment({"a": ["x0", "x1"], "b": ["y0", "y1"]}, popularity="uniform")
    one, other = (plan_block(config, arm, TEXTS, 0, 50.0) for arm in config.arms)
    assert [(p.due, p.text, p.model[1]) for p in one] == [(p.due, p.text, p.model[1]) for p in other]
    assert {planned.model for planned in other} == {"y0", "y1"}
    assert one != plan_block(config, config.arms[0], TEXTS, 1, 50.0)
    assert one == plan_block(config, config.arms[0], TEXTS, 0, 50.0)


def test_a_whole_experiment(experiment, stub):
    config = experiment({"fast": ["1ms"], "slow": ["60ms", "50ms"], "broken": ["0ms", "503"]}, rates=[30.0])
    measured, lines = run(config)
    summaries = {summary.arm: summary for summary in summarise(measured)}
    assert list(summaries) == ["fast", "slow", "broken"]
    counts = {name: sum(summary.outcomes.values()) for name, summary in summaries.items()}
    assert len(set(counts.values())) == 1
    assert summaries["fast"].outcomes["ok"] == counts["fast"]
    assert summaries["broken"].statuses.keys() == {200, 503}
    assert summaries["slow"].latency["total"][0] > 0.05
    assert len(measured.blocks) == 6
    # What the stub got besides was warm-up.
    assert stub.received.total() > sum(counts.values())
    assert [line for line in lines if line.startswith("[6/6] ")]


def test_shares_are_of_the_capacity_of_the_slowest_arm(experiment):
    """Two callers and 100 ms an answer make at most 20 answers a second, and fewer on a busy machine."""
    config = experiment({"fast": ["1ms"], "slow": ["100ms"]}, rates=None, shares=[0.25, 0.5])
    measured, _ = run(config)
    assert 0 < measured.capacity["slow"] < 21
    assert measured.capacity["slow"] < measured.capacity["fast"]
    assert measured.rates == [0.25 * measured.capacity["slow"], 0.5 * measured.capacity["slow"]]


def test_a_server_that_never_answers_well_stops_the_experiment(experiment):
    config = experiment({"good": ["0ms"], "bad": ["404"]})
    with pytest.raises(LoadTestError, match=r"bad: .* answered none of .* http error 404"):
        run(config)


def test_blocks_are_bounded_in_count(experiment):
    config = experiment({"one": ["0ms"]}, rates=[100.0], max_requests=10)
    with pytest.raises(LoadTestError, match=r"100\.0/s has more than max_requests"):
        run(config)
