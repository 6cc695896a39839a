"""Batches of every kind of request: rows of prompts, and generations that run."""

from __future__ import annotations

from molex import BARE, Row
from molex.kv_cache import pages_for
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
