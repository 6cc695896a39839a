"""Schedules: Poisson, popular as asked, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.popularity import check_popularity, choose_models
from loadtests.schedule import Traffic, poisson_arrivals

POPULARITIES = ["uniform", "identical", "distinct", "zipf:1", "zipf:1.3"]
seeds = st.integers(0, 2**32)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@given(st.floats(0.1, 300), st.floats(0.01, 10), seeds)
def test_arrivals_are_in_order_within_the_block_and_reproducible(rate, seconds, seed):
    due = poisson_arrivals(rate, seconds, rng(seed))
    assert np.all(np.diff(due) >= 0)
    assert np.all((due >= 0) & (due < seconds))
    assert np.array_equal(due, poisson_arrivals(rate, seconds, rng(seed)))


def test_counts_are_poisson():
    counts = [len(poisson_arrivals(50, 2, rng(seed))) for seed in range(400)]
    # Mean and variance of a Poisson count are both rate · seconds; bounds are 4 standard errors.
    assert np.mean(counts) == pytest.approx(100, abs=4 * 10 / 20)
    assert np.var(counts) == pytest.approx(100, abs=4 * 100 * np.sqrt(2 / 400))


def test_gaps_are_exponential():
    gaps = np.diff(poisson_arrivals(100, 200, rng()))
    assert gaps.mean() == pytest.approx(1 / 100, rel=0.04)
    assert gaps.std() == pytest.approx(1 / 100, rel=0.06)
    assert np.mean(gaps > 1 / 100) == pytest.approx(np.exp(-1), abs=0.02)


@given(st.sampled_from(POPULARITIES), st.integers(1, 50), st.integers(0, 200), seeds)
def test_choices_are_models_and_reproducible(popularity, num_models, count, seed):
    chosen = choose_models(popularity, num_models, count, rng(seed))
    assert chosen.shape == (count,)
    assert np.all((chosen >= 0) & (chosen < num_models))
    assert np.array_equal(chosen, choose_models(popularity, num_models, count, rng(seed)))


@pytest.mark.parametrize(
    ("popularity", "shares"),
    [
        ("uniform", [0.25, 0.25, 0.25, 0.25]),
        ("identical", [1, 0, 0, 0]),
        ("zipf:1", np.array([12, 6, 4, 3]) / 25),
        ("zipf:2", np.array([144, 36, 16, 9]) / 205),
    ],
)
def test_shares(popularity, shares):
    chosen = choose_models(popularity, 4, 40_000, rng())
    assert np.bincount(chosen, minlength=4) / 40_000 == pytest.approx(shares, abs=0.01)


@given(st.integers(1, 20), st.integers(0, 100), seeds)
def test_distinct_repeats_a_model_only_after_all_others(num_models, count, seed):
    chosen = choose_models("distinct", num_models, count, rng(seed)).tolist()
    for start in range(count):
        window = chosen[start : start + num_models]
        assert len(set(window)) == len(window)


@pytest.mark.parametrize("text", POPULARITIES)
def test_popularity_is_accepted(text):
    assert check_popularity(text) == text


@pytest.mark.parametrize(
    "text", ["", "zipf", "zipf:", "zipf:-1", "zipf:nan", "zipf:1e9", "Uniform", "zipf:1 "]
)
def test_popularity_is_refused(text):
    with pytest.raises(ValueError, match="zipf:EXPONENT"):
        check_popularity(text)


@given(st.lists(st.text(min_size=1), min_size=1), seeds)
def test_plan_takes_texts_and_models_from_its_lists(texts, seed):
    traffic = Traffic(texts, ["one", "two"], "uniform")
    due = np.arange(20.0)
    plan = traffic.plan(due, rng(seed))
    assert [planned.due for planned in plan] == due.tolist()
    assert {planned.text for planned in plan} <= set(texts)
    assert {planned.model for planned in plan} <= {"one", "two"}
    assert plan == traffic.plan(due, rng(seed))
    if len(set(texts)) > 5:
        assert len({planned.text for planned in plan}) > 1
