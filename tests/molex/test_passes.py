"""A forward pass that stops between depths."""

from __future__ import annotations

import pytest
import torch

from molex import BARE, MolexModel, Row
from molex.routing import flat_route
from tests.tiny import LAYERS, molex_config, random_adapter, random_ids, tiny_base


@pytest.fixture(scope="module", params=["llama", "roberta"])
def model(request, tmp_path_factory):
    return MolexModel.from_pretrained(tiny_base(request.param, tmp_path_factory.mktemp(request.param)))


def rows(model):
    mixtures = [None, molex_config(), molex_config([0, 3], vote={"rule": "mean"}, top_k=2)]
    kinds = [random_adapter(model.spec, seed=n, molex=molex) for n, molex in enumerate(mixtures)]
    return [Row(random_ids(5 + n, seed=n), adapter) for n, adapter in enumerate([BARE, *kinds])]


@torch.no_grad()
@pytest.mark.parametrize("stops", [[1] * LAYERS, [2, 3], [4, 0, 1]], ids=str)
def test_where_it_stops_changes_nothing_and_passes_between_do_not_either(model, stops):
    whole, running = model.run(rows(model)), model.begin(rows(model))
    for depths in stops:
        running.advance(depths)
        model.run([Row(random_ids(3, seed=9))])
    assert running.depths_left == running.tokens_left == 0
    output = running.output()
    assert [flat_route(route) for route in output.routes] == [flat_route(route) for route in whole.routes]
    assert output.stats == whole.stats
    for logits, expected in zip(output.logits, whole.logits, strict=True):
        assert torch.equal(logits, expected)


@torch.no_grad()
def test_work_is_counted_in_tokens(model):
    running = model.begin([Row(random_ids(20, seed=1))])
    assert (running.tokens_left, running.depths_left) == (20, LAYERS)
    assert [running.depths_within(tokens) for tokens in (0, 7, 8, 19, 99)] == [1, 1, 2, 4, LAYERS]
    running.advance(3)
    assert (running.tokens_left, running.depths_left) == (8, 2)
    assert running.depths_within(99) == 2
