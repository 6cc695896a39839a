"""Loads beside neighbours: what is sent to a server, and the figures made of the times."""

from __future__ import annotations

import pytest

from benchmarks.bench_adapter_load import ALONE, BESIDE, EVICTED, QUIET, Times, figures_of, p99


def test_p99_is_a_time_that_was_measured():
    assert p99([n / 1000 for n in range(1, 101)]) == pytest.approx(99)


def test_figures_compare_tails():
    times = {
        QUIET: Times(neighbours=[0.010] * 100),
        BESIDE: Times(neighbours=[0.010] * 98 + [0.012] * 2, loads=[0.020] * 99 + [0.060]),
        ALONE: Times(loads=[0.005] * 98 + [0.055] * 2),
        EVICTED: Times(loads=[0.030] * 100),
    }
    alone, beside, evicted, neighbours = figures_of(times, "setting")
    assert (alone.value, alone.held) == (pytest.approx(55), False)
    assert (beside.value, beside.held) == (pytest.approx(20), True)
    assert (evicted.value, evicted.held) == (pytest.approx(30), True)
    assert (neighbours.value, neighbours.held) == (pytest.approx(1.2), False)
