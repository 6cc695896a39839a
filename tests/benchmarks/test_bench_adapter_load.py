"""Loads beside neighbours: what is sent to a server, and the figures made of the times."""

from __future__ import annotations

import pytest

from benchmarks.bench_adapter_load import (
    BESIDE_FIRST,
    BESIDE_LOADS,
    BESIDE_MORE,
    DISK,
    FIRST,
    LOADS,
    QUIET,
    Times,
    figures_of,
    p99,
)


def test_p99_is_a_time_that_was_measured():
    assert p99([n / 1000 for n in range(1, 101)]) == pytest.approx(99)


def test_figures_compare_tails():
    quick = [0.010] * 100
    times = {
        QUIET: Times(neighbours=quick),
        BESIDE_LOADS: Times(neighbours=[0.010] * 98 + [0.012] * 2, loads=[0.020] * 99 + [0.060]),
        BESIDE_FIRST: Times(neighbours=[0.022] * 100, loads=[0.050] * 100),
        BESIDE_MORE: Times(neighbours=[0.020] * 100, loads=quick),
        LOADS: Times(loads=[0.005] * 98 + [0.055] * 2),
        DISK: Times(loads=[0.002] * 98 + [0.500] * 2),
        FIRST: Times(loads=[0.030] * 100),
    }
    figures = figures_of(times, "setting")
    assert [figure.value for figure in figures] == pytest.approx([55, 20, 500, 30, 50, 1.2, 1.1])
    assert [figure.held for figure in figures] == [False, True, True, True, True, False, True]
