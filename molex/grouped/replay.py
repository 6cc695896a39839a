"""Work of fixed shapes, launched as a whole where the device can do that."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Replay:
    """Calls a function of tensors of fixed shapes, which a GPU runs as a CUDA graph from the second call on.

    The first call runs as it is written, so that what PyTorch sets up at first use is there before the graph
    is recorded; a function that is called once is not worth a graph. The function must not wait for the
    device, and what it reads beside its arguments has to stay where it is. What a call returns is overwritten
    by the next.

    It does not hold the function, which may be a method of its owner: the graph goes with that at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._records = device.type == "cuda"
        self._is_warm = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: Sequence[Tensor] = ()
        self._output: Tensor | None = None

    def __call__(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if not (self._records and self._is_warm):
            self._is_warm = True
            return function(*inputs)
        if self._graph is None:
            self._record(function, inputs)
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given)
        assert self._graph is not None
        assert self._output is not None
        self._graph.replay()
        return self._output

    def _record(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        self._inputs = [given.clone() for given in inputs]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._output = function(*self._inputs)
        self._graph = graph
