"""What a server is doing, as its metrics tell."""

from __future__ import annotations

from tests.server.conftest import Live

LONG = {"max_tokens": 60, "ignore_eos": True, "temperature": 0}


def running(live: Live) -> float:
    return live.metrics()['molex_running_sequences{base="dec"}']


def idle(live: Live) -> bool:
    """Nothing runs or waits, and every page of the cache is free."""
    left = running(live) + waiting(live, "dec") + waiting(live, "enc")
    return left == 0 and all_free(live)


def all_free(live: Live) -> bool:
    runner = live.engine.bases["dec"].runner
    return runner.num_free_pages == runner.num_pages


def waiting(live: Live, base: str) -> float:
    return live.metrics()[f'molex_queue_depth{{base="{base}"}}']
