"""What all tests share: tiny base models, made once, and no limit on the time of an example."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

from examples.demo import ADAPTERS, BASES, running_server
from molex import MolexModel
from molex.backbone import BaseSpec
from scripts.readme_output import PROJECT
from tests.tiny import tiny_base

# How long an example takes depends on the machine and on what else runs there.
settings.register_profile("molex", deadline=None)
settings.load_profile("molex")


def pytest_collection_finish() -> None:
    """What the imports have made stays: looking through all of it takes each full collection 0.3 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a random base model of a family. Tests must not change it."""
    return cache(lambda family: tiny_base(family, tmp_path_factory.mktemp(f"{family}-base")))


@pytest.fixture(scope="session")
def spec_of(base_folder) -> Callable[[str], BaseSpec]:
    """The facts of the random base model of a family."""
    return cache(lambda family: MolexModel.from_pretrained(base_folder(family)).spec)


@pytest.fixture(scope="module")
def demo_url() -> Iterator[str]:
    """The URL of a server of the demo bases and the adapters of the examples."""
    if missing := [folder for folder in BASES.values() if not (PROJECT / folder).is_dir()]:
        pytest.skip(f"{', '.join(missing)}: not there; `make models` prepares them")
    with running_server(BASES, ADAPTERS) as address:
        yield address
