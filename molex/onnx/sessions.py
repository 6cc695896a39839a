"""Graphs that ONNX Runtime runs on tensors of PyTorch, without copying them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

PROVIDERS = ["CPUExecutionProvider"]
ERRORS = 3
"""The least of what ONNX Runtime logs."""
EXACT_BYTES = ("avx512_vnni", "avx_vnni", "amx_int8")
"""What x86 CPUs say of themselves that sum products of bytes in 32 bits. On others ONNX Runtime's fastest
products overflow 16, unless it is told to take slower ones."""


class Session:
    """A graph with one output [n, width], all of float32. One thread runs it at a time."""

    def __init__(self, graph: bytes) -> None:
        self._session = onnxruntime.InferenceSession(graph, _options(), providers=PROVIDERS)
        self._binding = self._session.io_binding()
        self.widths: dict[str, int] = {node.name: node.shape[1] for node in self._session.get_inputs()}
        """Of the inputs, by name."""
        [output] = self._session.get_outputs()
        self.width: int = output.shape[1]

    def run(self, inputs: Mapping[str, Tensor], output: Tensor) -> None:
        """Fill `output` [n, width]; inputs that are not given are those of the call before.

        All of them are contiguous. What is left from a call before must be empty or still be there: the
        session reads from its address.
        """
        for name, tensor in inputs.items():
            self._binding.bind_input(name, "cpu", 0, np.float32, tensor.shape, tensor.data_ptr())
        if not len(output):
            return  # It has no address.
        self._binding.bind_output("output", "cpu", 0, np.float32, output.shape, output.data_ptr())
        self._session.run_with_iobinding(self._binding)


def _options() -> Any:
    _share()
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    options.add_session_config_entry("session.use_env_allocators", "1")
    # Between two sessions others compute on the same CPUs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = ERRORS
    if bytes_overflow():
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def bytes_overflow() -> bool:
    """Whether ONNX Runtime's fastest products of bytes may overflow on this CPU."""
    return not any(torch.cpu.get_capabilities().get(flag) for flag in EXACT_BYTES)


@cache
def _share() -> None:
    """Have all sessions share threads, as many as PyTorch has, and memory for what lies between operators."""
    onnxruntime.set_global_thread_pool_sizes(torch.get_num_threads(), 1)
    kind, use = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, onnxruntime.OrtMemType.DEFAULT
    onnxruntime.create_and_register_allocator(onnxruntime.OrtMemoryInfo("Cpu", kind, 0, use), None)
