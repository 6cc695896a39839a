"""Rounds, medians and the choice of the fastest."""

from __future__ import annotations

from benchmarks.common import fastest, in_turn, measure, milliseconds, sentences, zipf


def test_every_contestant_runs_once_a_round_and_once_to_warm_up():
    ran: list[str] = []
    medians = measure({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, rounds=3)
    assert [sorted(ran[i : i + 2]) for i in range(0, len(ran), 2)] == [["a", "b"]] * 4
    assert set(medians) == {"a", "b"}


def test_batches_run_in_their_order():
    ran: list[int] = []
    in_turn([lambda: ran.append(1), lambda: ran.append(2)])()
    assert ran == [1, 2]


def test_fastest_is_looked_for_among_the_named():
    medians = {"a": 0.1, "b": 0.2, "c": 0.3}
    assert fastest(medians, ["b", "c"]) == "b"
    assert milliseconds(medians, ["b"]) == {"b, ms": 200}


def test_inputs_are_the_same_in_every_run():
    assert sentences(20, seed=1) == sentences(20, seed=1)
    assert {len(ids) for ids in sentences(200, seed=1)} <= set(range(6, 61))
    assert zipf(50, 5, seed=1) == zipf(50, 5, seed=1)
    assert set(zipf(500, 5, seed=1)) == set(range(5))
