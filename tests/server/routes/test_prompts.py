"""Where texts are tokenized."""

from __future__ import annotations

import pytest

from server.routes.prompts import SHORT_CHARACTERS

SHORT = ("w1 " * 100)[:SHORT_CHARACTERS]
PAIR = [SHORT[:100], SHORT[100:]]


@pytest.mark.parametrize(
    ("texts", "times"),
    [(SHORT, 0), ([PAIR], 0), (SHORT + "1", 1), ([PAIR, "w"], 1)],
    ids=["short", "short pair", "long", "long together"],
)
def test_only_what_takes_long_is_tokenized_on_a_pool_thread(live, monkeypatch, texts, times):
    calls = []
    in_pool = live.engine.in_pool

    def counted(*args, **kwargs):
        calls.append(args)
        return in_pool(*args, **kwargs)

    monkeypatch.setattr(live.engine, "in_pool", counted)
    assert live.classify(model="mood", input=texts).status_code == 200
    assert len(calls) == times
