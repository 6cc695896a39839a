"""Reloading and unloading: no answer is mixed, nothing is left behind, and the base stays what it was."""

from __future__ import annotations

import ctypes
import gc
import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Semaphore
from weakref import ReferenceType, ref

import pytest
import torch

from molex import MolexModel
from molex.adapter import Adapter
from server.adapters import AdapterStore
from tests.server.conftest import Live
from tests.server.named import write_named
from tests.server.plain_client import plain_client

MOST_GROWTH = 20 * 2**20
PAGE = 4096


@pytest.fixture(scope="module")
def versions(models, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("versions")
    return folder, write_named(models["enc"].spec, folder, 8)


def resident(live: Live, name: str) -> ReferenceType[Adapter]:
    weights = live.engine.adapters.weights(live.engine.adapters.get(name))
    assert weights is not None
    return ref(weights)


def released(live: Live, references: list[ReferenceType[Adapter]]) -> bool:
    """Whether nothing holds these adapters; the worker may still be on its way out of its last step."""
    for _ in range(20):
        gc.collect()
        if all(reference() is None for reference in references):
            return True
        live.http.get("/livez")
    return False


@pytest.mark.parametrize(
    ("clients", "reloads"),
    [
        (8, 16),
        pytest.param(32, 1024, marks=pytest.mark.faults),
    ],
)
def test_every_answer_under_reloads_is_of_one_version_and_says_which(
    start, settings, versions, clients, reloads
):
    folder, digests = versions
    live = start(settings.model_copy(update={"adapter_root": folder}))
    assert live.load("shifting", "v0").status_code == 201
    done, answered = Event(), Semaphore(0)

    def work(_: int) -> Counter[str]:
        seen: Counter[str] = Counter()
        with plain_client(live.url) as post:
            while not done.is_set():
                answer, headers = post("/v1/classify", {"model": "shifting", "input": ["w1 w2", "w3"]})
                [label] = {entry["label"] for entry in answer["data"]}
                assert answer["adapter_digest"] == headers["x-adapter-digest"] == digests[label]
                seen[label] += 1
                answered.release()
        return seen

    references = []
    with ThreadPoolExecutor(clients) as pool:
        workers = [pool.submit(work, number) for number in range(clients)]
        try:
            for number in range(1, reloads + 1):
                # Requests are always under way: some end between any two reloads.
                assert answered.acquire(timeout=60)
                assert live.load("shifting", f"v{number % 8}").status_code == 200
                references.append(resident(live, "shifting"))
        finally:
            done.set()
        seen = sum((worker.result() for worker in workers), Counter())
    assert seen.keys() == digests.keys()
    assert live.unload("shifting").status_code == 204
    assert released(live, references)


def rss() -> int:
    """What this process has in memory, in bytes, once what is free has gone back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def growth(live: Live, churns: int) -> int:
    """What the process grows by while an adapter of 1.3 MB comes, answers every tenth time, and goes."""

    def churn(times: int) -> None:
        for number in range(times):
            assert live.load("passing", f"v{number % 2}").status_code == 201
            if number % 10 == 0:
                assert live.classify(model="passing", input="w1").status_code == 200
            assert live.unload("passing").status_code == 204

    churn(25)
    before = rss()
    churn(churns)
    return rss() - before


@pytest.fixture
def heavy(start, settings, models, tmp_path) -> Live:
    """A server that may load `v0` and `v1`, of 1.3 MB each."""
    write_named(models["enc"].spec, tmp_path, 2, rank=512)
    return start(settings.model_copy(update={"adapter_root": tmp_path}))


@pytest.mark.parametrize("churns", [50, pytest.param(5000, marks=pytest.mark.faults)])
def test_adapters_that_come_and_go_leave_no_memory_behind(heavy, churns):
    assert growth(heavy, churns) < MOST_GROWTH


def test_a_store_that_forgets_to_let_go_would_be_noticed(heavy, monkeypatch):
    kept = []
    remove = AdapterStore.remove

    def leaking(self: AdapterStore, name: str):
        kept.append(self.weights(self.get(name)))
        return remove(self, name)

    monkeypatch.setattr(AdapterStore, "remove", leaking)
    assert growth(heavy, 50) > 2 * MOST_GROWTH


def weights_hash(model: MolexModel) -> str:
    """Of every weight of a base."""
    backbone = model.backbone
    digest = hashlib.sha256()
    for module in filter(None, (backbone._base, backbone.lm_head)):
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_adapters_leave_the_base_as_it_was(start, settings, precision):
    live = start(settings.model_copy(update={"precision": precision}))
    bases = [base.model for base in live.engine.bases.values()]

    def bare() -> list[object]:
        vector = live.embed(model="enc", input="w1 w2").json()["data"]
        text = live.complete(model="dec", prompt="w1 w2", temperature=0, max_tokens=8, logprobs=2).json()
        return [vector, text["choices"]]

    hashes, answers = [weights_hash(model) for model in bases], bare()
    for name in ("mood", "topic", "rank2", "judge"):
        assert live.load("copy", name).status_code in (200, 201)
        assert live.classify(model="copy", input="w1 w2 w3").status_code == 200
    for name in ("writer", "poet"):
        assert live.load("copy", name).status_code == 200
        assert live.complete(model="copy", prompt="w1 w2 w3", max_tokens=8).status_code == 200
    assert live.unload("copy").status_code == 204
    assert [weights_hash(model) for model in bases] == hashes
    assert bare() == answers
