"""Many adapters against few: who is asked for, and the figures made of the rates."""

from __future__ import annotations

import pytest

from benchmarks.bench_many_adapters import Measured, figures_of, plan


def test_popular_adapters_are_asked_for_most_and_others_too():
    asked = [planned.model for planned in plan(["first", "second", "third"], seed=1)]
    assert asked.count("first") > asked.count("second") > asked.count("third") > 0


def test_the_fastest_precision_is_held_to_the_bound():
    measured = {
        "float32": Measured({5: 50.0, 64: 50.0, 2000: 45.0}, cold_loads=20.0),
        "bfloat16": Measured({5: 100.0, 64: 99.0, 2000: 98.0}, cold_loads=40.0),
    }
    figures = figures_of(measured, few=5, resident=64, many=2000)
    assert [figure.value for figure in figures] == pytest.approx([1, 0.9, 0.99, 0.98])
    assert [figure.bound for figure in figures] == [None, None, None, 0.97]
    assert figures[3].held
    assert figures[3].measured["cold loads/s"] == 40
