"""Batches of every kind of request: rows of prompts, and generations that run."""

from __future__ import annotations

import torch

from molex import BARE, Row
from molex.kv_cache import pages_for
from molex.reference import Reference
from tests.tiny import LAYERS, molex_config, random_adapter, random_ids

ROOM = 70
"""Tokens that a generation has pages for."""
MIXTURES = [
    None,
    molex_config(),
    molex_config([0, 3]),
    molex_config([1, LAYERS - 1], vote={"rule": "mean"}),
    molex_config(vote={"rule": "mean", "score": "sigmoid"}, top_k=2),
]


def mixed_rows(model, lengths):
    """Bare rows and rows of every kind of mixture, in turn; every third has voters of its own."""
    task = "CAUSAL_LM" if model.spec.generates else "SEQ_CLS"
    adapters = [
        BARE,
        *(random_adapter(model.spec, seed=n, r=1 + n, task=task, molex=m) for n, m in enumerate(MIXTURES)),
    ]
    return [
        Row(random_ids(n, seed=i), adapters[i % len(adapters)], voters=(n + 1) // 2 if i % 3 == 0 else None)
        for i, n in enumerate(lengths)
    ]


def together_and_alone(model, lengths):
    """The route and the logits of each row, among the others and by itself."""
    rows = mixed_rows(model, lengths)
    together = model.run(rows)
    for row, route, logits in zip(rows, together.routes, together.logits, strict=True):
        alone = model.run([row])
        yield (route, logits), (alone.routes[0], alone.logits[0])


def generators(model):
    mixtures = [None, molex_config(), molex_config([0, 3], top_k=2), None]
    return [BARE] + [
        random_adapter(model.spec, seed=n, task="CAUSAL_LM", r=1 + 2 * n, molex=molex)
        for n, molex in enumerate(mixtures)
    ]


class Generations:
    """Prompts that have run, and the rows of their next tokens, which are random.

    With `routes` the prompts have not: nothing is cached of them.
    """

    def __init__(self, model, adapters, lengths, routes=None):
        self.model, self.adapters = model, adapters
        self.cache = model.new_cache(sum(pages_for(ROOM, a.num_streams) for a in adapters))
        self.slots = [self.cache.allocate(ROOM, adapter.num_streams) for adapter in adapters]
        self.texts = [random_ids(n, seed=i) for i, n in enumerate(lengths)]
        rows = [
            Row(text, adapter, slot=slot)
            for text, adapter, slot in zip(self.texts, adapters, self.slots, strict=True)
        ]
        self.routes = routes or model.run(rows, self.cache).routes

    def grow(self, seed):
        for i, text in enumerate(self.texts):
            text.append(random_ids(1, seed=1000 * seed + i)[0])

    def rows(self):
        return [
            Row(text[-1:], adapter, slot=slot, start=len(text) - 1, route=route)
            for text, adapter, slot, route in zip(
                self.texts, self.adapters, self.slots, self.routes, strict=True
            )
        ]


def relative_error(given, expected):
    return float((given.float() - expected.float()).norm() / expected.float().norm())


def assert_steps_equal_the_full_forward(model, folder):
    reference, adapters = Reference(folder), generators(model)
    running = Generations(model, adapters, [3, 15, 1, 31, 13])
    for step in range(5):
        running.grow(step)
        output = model.run(running.rows(), running.cache)
        for i, (text, adapter) in enumerate(zip(running.texts, adapters, strict=True)):
            expected, route = reference(text, adapter, voters=len(text) - step - 1)
            assert [c.layers for c in route] == [c.layers for c in output.routes[i]]
            torch.testing.assert_close(output.logits[i], expected[-1], atol=1e-4, rtol=1e-4)
