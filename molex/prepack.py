"""Linear layers with weights laid out for the CPU's matrix kernels once, instead of at every call.

PyTorch hands float32 products to MKL, which runs at half speed on CPUs that are not Intel's, and lets oneDNN
reorder a bfloat16 weight at every call. Weights in oneDNN's own layout avoid both: on a Zen 5 core 2.2 times
as fast in float32, and in bfloat16 from 1.1 times (a thousand rows) to 1.4 times (sixteen rows) as fast. See
`benchmarks/bench_kernels.py`. They replace the plain weights, so they cost no memory, and take no gradients.

oneDNN compiles a kernel for every number of rows that it meets and keeps it: 0.8 to 4 ms and 1 MB each on
that core. No two batches have the same number of tokens, so rows are padded to a number out of a small set.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# oneDNN chooses a layout for a number of rows. All sizes run with any layout; this one serves a full batch.
TYPICAL_ROWS = 512


def padded_rows(rows: int) -> int:
    """The number of rows to run in place of `rows`: less than 8 more, or less than a sixteenth more."""
    if rows <= 16:
        return rows
    step = max(8, (1 << (rows.bit_length() - 1)) // 16)
    return -(-rows // step) * step


def can_prepack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this build of PyTorch has oneDNN's kernels for a precision and device."""
    available = torch.backends.mkldnn.is_available() and device.type == "cpu"
    if dtype == torch.bfloat16:
        return available and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return available and dtype == torch.float32


class PrepackedLinear(nn.Module):
    """y = x Wᵀ + b for x [n, in], without gradients."""

    def __init__(self, *linears: nn.Module) -> None:
        """Take over the weights of layers with the same input, whose outputs will lie side by side.

        They are each an `nn.Linear` or transformers `Conv1D`.
        """
        super().__init__()
        weights, biases = zip(*map(weight_and_bias, linears), strict=True)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights), TYPICAL_ROWS)
        self.bias = None if biases[0] is None else torch.cat(biases)
        # The overload itself: choosing it anew at each call takes some microseconds.
        self._linear = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("this model was prepacked for inference and cannot be trained")
        return self._linear(x, self.weight, self.bias, "none", [], "")  # type: ignore[no-any-return]


def weight_and_bias(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """W [out, in] and b [out] of a layer."""
    assert isinstance(linear, nn.Linear | Conv1D)
    weight = linear.weight.detach()
    bias = None if linear.bias is None else linear.bias.detach()
    return (weight.T if isinstance(linear, Conv1D) else weight), bias


def in_and_out(linear: nn.Module) -> tuple[int, int]:
    """The numbers of inputs and outputs of an `nn.Linear` or `Conv1D`."""
    outputs, inputs = weight_and_bias(linear)[0].shape
    return inputs, outputs
