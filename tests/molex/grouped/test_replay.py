"""Work of fixed shapes that is recorded once and replayed."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from molex.grouped.replay import Replay

CUDA = torch.device("cuda")


class Graph:
    """A CUDA graph's manners without a GPU: what was recorded runs again on the tensors that it was given."""

    def __init__(self):
        self.work = lambda: None

    def replay(self):
        self.work()


@pytest.fixture
def recorder(monkeypatch):
    """Graphs that were recorded."""
    graphs = []

    @contextmanager
    def graph(recorded):
        graphs.append(recorded)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return graphs


def test_the_cpu_runs_the_function_every_time(recorder):
    replay = Replay(torch.device("cpu"))
    assert [float(replay(torch.add, torch.tensor(n), torch.tensor(1.0))) for n in range(3)] == [1, 2, 3]
    assert recorder == []


def test_a_gpu_records_the_second_call_and_replays_it_with_new_inputs(recorder):
    seen = []

    def work(x):
        seen.append(x)
        return x * 2

    replay = Replay(CUDA)
    assert float(replay(work, torch.tensor(1.0))) == 2
    assert recorder == []
    output = replay(work, torch.tensor(2.0))
    [graph] = recorder
    graph.work = lambda: output.copy_(seen[-1] * 2)
    assert float(replay(work, torch.tensor(3.0))) == 6
    assert replay(work, torch.tensor(5.0)) is output
    assert float(output) == 10
    assert len(seen) == 2
    assert len(recorder) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_gives_what_the_function_gives():
    weight = torch.randn(8, 8, device=CUDA)
    replay = Replay(CUDA)
    for _ in range(4):
        x = torch.randn(3, 8, device=CUDA)
        torch.testing.assert_close(replay(lambda x: (x @ weight).relu(), x).clone(), (x @ weight).relu())
