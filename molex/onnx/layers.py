"""Layers on ONNX Runtime: two sessions a layer, and one for the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from molex.layers import InPyTorch
from molex.lora import ActiveLora
from molex.onnx.sessions import Session
from molex.stage import Stage

UPDATE = ("a", "b", "gates")
"""The inputs of a linear layer; see `molex/onnx/graphs.py`."""
Update = tuple[Tensor, Tensor, Tensor]


class Half:
    """One half of a layer."""

    def __init__(self, graph: bytes) -> None:
        self._session = Session(graph)
        self.width = self._session.width
        widths = self._session.widths
        sites = [name.removesuffix(".a") for name in widths if name.endswith(".a")]
        self._nothing = {site: _no_update(widths[f"{site}.a"], widths[f"{site}.b"]) for site in sites}
        self._updated = set(sites)
        """The linear layers that had updates in the last call; before the first, all inputs are to be set."""

    def run(self, rows: Mapping[str, Tensor], lora: ActiveLora | None, layer: int, output: Tensor) -> None:
        """Fill `output` [n, width] from the rows [n, …] of the inputs, with the updates of a layer."""
        self._session.run({**rows, **self._updates(lora, layer, len(output))}, output)

    def _updates(self, lora: ActiveLora | None, layer: int, count: int) -> dict[str, Tensor]:
        """The inputs of linear layers with updates, and of those that had some in the call before."""
        updates: dict[str, Update] = {}
        if lora is not None:
            given = {site: lora.side_by_side((layer, site), count) for site in self._nothing}
            updates = {site: update for site, update in given.items() if update is not None}
        none_now = {site: self._nothing[site] for site in self._updated - updates.keys()}
        self._updated = set(updates)
        return {
            f"{site}.{name}": tensor
            for site, update in (updates | none_now).items()
            for name, tensor in zip(UPDATE, update, strict=True)
        }


def _no_update(inputs: int, outputs: int) -> Update:
    return torch.empty(0, inputs), torch.empty(0, outputs), torch.empty(0, 0)


@contextmanager
def alone() -> Iterator[None]:
    """Have PyTorch compute on the calling thread: its others hold their CPUs for a while after an operation.

    ONNX Runtime, whose sessions lie between the operations, has threads of its own.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class OnnxLayers(InPyTorch):
    """The layers of a base model in float32, with weights in as many bits or fewer. No gradients."""

    dtype = torch.float32
    attend = alone()(InPyTorch.attend)
    gate_logits = alone()(InPyTorch.gate_logits)
    mix = alone()(InPyTorch.mix)

    def __init__(
        self, graphs: Iterable[tuple[bytes, bytes]], num_layers: int, vocabulary: bytes | None
    ) -> None:
        """`graphs`: the halves of each layer, and behind them those of the routed branch if it has its own.

        `vocabulary` is the graph of a decoder's language model head.
        """
        self.nbytes = 0
        self._projecting: list[Half] = []
        self._finishing: list[Half] = []
        for projecting, finishing in graphs:
            self._projecting.append(Half(projecting))
            self._finishing.append(Half(finishing))
            # All else in a graph is some kilobytes.
            self.nbytes += len(projecting) + len(finishing)
        self._num_layers = num_layers
        self._vocabulary = vocabulary
        self.first_routed = len(self._projecting) - num_layers

    def padded_rows(self, rows: int) -> int:
        return rows

    def compiled_sizes(self, max_rows: int) -> Sequence[int]:
        """Nothing is compiled; the first call of a session takes longer."""
        return [min(1, max_rows)]

    def vocabulary(self, head: nn.Module) -> nn.Module:
        assert self._vocabulary is not None
        return OnnxVocabulary(self._vocabulary, head)

    @alone()
    def project(self, stage: Stage, numbers: Sequence[int], hidden: Tensor) -> Tensor:
        inputs = [{"hidden": x} for x in stage.read(hidden)]
        output = hidden.new_empty(sum(stage.counts), self._projecting[0].width)
        self._run(self._projecting, stage, numbers, inputs, output.split(list(stage.counts)))
        return output

    @alone()
    def finish(
        self, stage: Stage, numbers: Sequence[int], hidden: Tensor, attended: Tensor
    ) -> Sequence[Tensor]:
        counts = list(stage.counts)
        pairs = zip(stage.read(hidden), attended.contiguous().split(counts), strict=True)
        inputs = [{"hidden": x, "attended": y} for x, y in pairs]
        outputs: Sequence[Tensor] = hidden.new_empty(sum(counts), hidden.shape[1]).split(counts)
        self._run(self._finishing, stage, numbers, inputs, outputs)
        return outputs

    def _run(
        self,
        halves: Sequence[Half],
        stage: Stage,
        numbers: Sequence[int],
        inputs: Sequence[Mapping[str, Tensor]],
        outputs: Sequence[Tensor],
    ) -> None:
        for number, rows, lora, output in zip(numbers, inputs, stage.active, outputs, strict=True):
            halves[number].run(rows, lora, number % self._num_layers, output)


class OnnxVocabulary(nn.Module):
    """The language model head: hidden states [..., d] → logits [..., V].

    Its weights stay where PyTorch has them, as the embedding may have the same.
    """

    def __init__(self, graph: bytes, head: nn.Module) -> None:
        super().__init__()
        weight = head.weight
        assert isinstance(weight, Tensor)
        self._weight = weight
        self._session = Session(graph)

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.flatten(0, -2).contiguous()
        logits = rows.new_empty(len(rows), len(self._weight))
        self._session.run({"hidden": rows, "weight": self._weight}, logits)
        return logits.unflatten(0, hidden.shape[:-1])  # type: ignore[no-any-return]
