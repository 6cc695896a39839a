"""Which layers run as grouped products."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from molex.grouped.layers import can_group

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("on_gpu", "dtypes", "widths", "can"),
    [
        (True, [BF16, BF16], (32, 64), True),
        (False, [BF16, BF16], (32, 64), False),
        (True, [torch.float32] * 2, (32, 64), False),
        (True, [torch.float32, BF16], (32, 64), False),
        (True, [BF16, BF16], (32, 60), False),
        (True, [BF16, BF16], (28, 64), False),
    ],
)
def test_layers_on_a_gpu_in_bfloat16_of_whole_16_bytes_are_grouped(on_gpu, dtypes, widths, can):
    block = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(is_cuda=on_gpu)]))
    stock = SimpleNamespace(blocks=[block, block], dtypes=dtypes, modules={"query": (32, 32), "up": widths})
    assert can_group(stock) is can
