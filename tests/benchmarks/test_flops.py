"""The operations of a pass against those that PyTorch counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from benchmarks.flops import Work, forward_flops, layer_flops, product_flops
from molex import MolexModel, Row
from molex.routing import Choice
from tests.tiny import HIDDEN, LAYERS, molex_config, random_adapter, random_ids


def attention_shapes(queries, keys, values, *args, out_shape=None, **kwargs):
    batch, heads, rows, size = queries
    return 4 * batch * heads * rows * keys[2] * size


# What PyTorch's counter leaves out of a pass on a CPU.
UNCOUNTED = {
    torch.ops.aten.addmm_: lambda y, a, b, out_shape=None, **kwargs: product_flops(*a, b[1]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_shapes,
}
PROJECTED = {f"attention.self.{name}": (HIDDEN, HIDDEN) for name in ("query", "key", "value")}


@pytest.fixture(scope="module")
def spec(spec_of):
    return spec_of("roberta")


def test_a_layer_counts_what_pytorch_counts(base_folder, spec):
    tokens = 13
    model = AutoModel.from_pretrained(
        base_folder("roberta"), attn_implementation="eager", add_pooling_layer=False
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.tensor([random_ids(tokens, seed=0)]))
    assert LAYERS * layer_flops(spec, tokens, tokens, {}) == counter.get_total_flops()


def test_a_pass_counts_what_pytorch_counts_but_for_padding_gates_and_heads(base_folder, spec):
    """One request of 16 tokens is not padded; the gate is counted by hand, the head of one row as well."""
    tokens = 16
    adapter = random_adapter(spec, seed=1, molex=molex_config())
    model = MolexModel.from_pretrained(base_folder("roberta"))
    ids = random_ids(tokens, seed=1)
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter, torch.no_grad():
        output = model.run([Row(ids, adapter)])
    gates = LAYERS * product_flops(tokens, HIDDEN, LAYERS)
    head = product_flops(1, HIDDEN, HIDDEN) + product_flops(1, HIDDEN, adapter.num_labels)
    counted = forward_flops(spec, [Work(tokens, adapter, output.routes[0])])
    assert counted + gates + head == counter.get_total_flops()


def test_a_routed_layer_that_is_the_own_one_runs_once(spec):
    adapter = random_adapter(spec, seed=2, molex=molex_config())
    own = tuple(Choice((depth,), (1.0,)) for depth in range(LAYERS))
    other = tuple(Choice(((depth + 1) % LAYERS,), (1.0,)) for depth in range(LAYERS))
    plain = forward_flops(spec, [Work(10, random_adapter(spec, seed=2), ())])
    assert forward_flops(spec, [Work(10, adapter, own)]) == plain
    assert forward_flops(spec, [Work(10, adapter, other)]) == 2 * plain


def test_requests_add_up(spec):
    adapter = random_adapter(spec, seed=3)
    one, other = Work(5, adapter, ()), Work(9, adapter, ())
    assert forward_flops(spec, [one, other]) == forward_flops(spec, [one]) + forward_flops(spec, [other])


def test_only_what_comes_before_attention_runs_for_all_tokens(spec):
    """Query, key and value of 6 tokens that nobody looks at."""
    projections = sum(product_flops(6, *sizes) for sizes in PROJECTED.values())
    attention = 4 * 6 * 6 * HIDDEN
    assert layer_flops(spec, 6, 0, {}) == projections + attention
