"""ONNX Runtime as a contestant of bench_onnx, in a process without PyTorch and its threads.

    python -m benchmarks.onnx_peer BASE LOAD OUTPUTS PRECISION SPINNING EXACT

It makes a graph of the layers of a base, loads it, runs it on every input of the file LOAD, writes what comes
out to the file OUTPUTS and prints a line. Then it answers every line of its standard input, the name of an
input and a number of passes, with one of its own when those have run.

LOAD has hidden states by name, and the low-rank factors of the layers, `a0`, `b0`, `a1`, …, which the graph
has as inputs. PRECISION is one of `PRECISIONS`. SPINNING is 1 or 0: whether threads look for work for a while
before they sleep. Between two passes they sleep in any case, as others compute then. EXACT is 1 where the
fastest products of bytes overflow on this CPU, so that slower ones are taken, else 0.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnxruntime.quantization import quantize_dynamic
from safetensors.numpy import load_file, save_file

from benchmarks.onnx_graphs import decoder, encoder

Array = npt.NDArray[Any]
PRECISIONS = {"float32": None, "int8": None, "8 bits in blocks": 8, "4 bits in blocks": 4}
"""The bits of MatMulNBits; `int8` is the graph in float32 after `quantize_dynamic`."""
GRAPHS = {"roberta": encoder, "llama": decoder}


def write_graph(base: Path, precision: str, folder: Path) -> Path:
    """The layers of a base as a file in `folder`."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    stored = load_file(base / "model.safetensors")
    weights = {name: tensor.astype(np.float32) for name, tensor in stored.items()}
    model = GRAPHS[config["model_type"]](weights, config, PRECISIONS[precision])
    plain, quantized = folder / "plain.onnx", folder / "quantized.onnx"
    onnx.save(model, plain)
    if precision != "int8":
        return plain
    # It does not know what type ONNX Runtime's own operators return.
    options = {"DefaultTensorType": onnx.TensorProto.FLOAT}
    quantize_dynamic(plain, quantized, per_channel=True, extra_options=options)
    return quantized


def session_of(graph: Path, spinning: str, exact: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.x64quantprecision", exact)
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class Layers:
    """A session, whose inputs and outputs lie where they are once and for all."""

    def __init__(self, session: Any, load: dict[str, Array], name: str) -> None:
        """`name`: of the hidden states in a load."""
        self._session = session
        self._binding = session.io_binding()
        factors = [node.name for node in session.get_inputs() if node.name != "hidden"]
        for place, array in {"hidden": load[name], **{key: load[key] for key in factors}}.items():
            self._binding.bind_ortvalue_input(place, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        self._outputs = []
        for node in session.get_outputs():
            array = np.zeros((*load[name].shape[:-1], node.shape[-1]), np.float32)
            self._outputs.append(onnxruntime.OrtValue.ortvalue_from_numpy(array))
            self._binding.bind_ortvalue_output(node.name, self._outputs[-1])

    def run(self, passes: int) -> None:
        for _ in range(passes):
            self._session.run_with_iobinding(self._binding)

    def outputs(self) -> list[Array]:
        """What the last pass made."""
        return [value.numpy() for value in self._outputs]


def main() -> None:
    base, inputs, outputs = map(Path, sys.argv[1:4])
    precision, spinning, exact = sys.argv[4:]
    with tempfile.TemporaryDirectory() as scratch:
        session = session_of(write_graph(base, precision, Path(scratch)), spinning, exact)
    load = load_file(inputs)
    factors = {node.name for node in session.get_inputs()}
    layers = {name: Layers(session, load, name) for name in load if name not in factors}
    for each in layers.values():
        each.run(1)
    results = ((name, enumerate(each.outputs())) for name, each in layers.items())
    save_file({f"{name}/{place}": array for name, arrays in results for place, array in arrays}, outputs)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        layers[request["inputs"]].run(request["passes"])
        print("done", flush=True)


if __name__ == "__main__":
    main()
