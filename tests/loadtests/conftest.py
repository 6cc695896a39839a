"""A stub server, and experiments on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from loadtests.config import Config
from tests.loadtests.stub import Stub, running


@pytest.fixture
def stub() -> Stub:
    return Stub()


@pytest.fixture
def url(stub) -> Iterator[str]:
    """Where the stub listens."""
    with running(stub) as address:
        yield address


@pytest.fixture
def experiment(url):
    """Makes configurations with arms on the stub, from the models of each arm by its name."""

    def make(arms: dict[str, list[str]], dialect: str = "molex-classify", **changes) -> Config:
        common = {"url": url, "dialect": dialect}
        common |= {"max_tokens": 8} if dialect == "openai-completions" else {}
        return Config.model_validate(
            {
                "arms": [{"name": name, "models": models} | common for name, models in arms.items()],
                "texts": "texts.txt",
                "popularity": "distinct",
                "rates": [20.0],
                "rounds": 2,
                "block_seconds": 0.5,
                "warmup_seconds": 0.1,
                "num_clients": 2,
                "timeout_seconds": 20.0,
            }
            | changes
        )

    return make
