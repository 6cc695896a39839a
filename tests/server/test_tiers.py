"""More adapters than fit into memory, over HTTP."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch

from tests.tiny import HIDDEN, LAYERS

CLASSIFIERS = ("mood", "topic", "rank2", "judge")
GENERATORS = ("writer", "poet")


@pytest.fixture
def folder(make_adapters, tmp_path):
    """Adapters for a test to spoil."""
    return make_adapters(tmp_path / "adapters")


@pytest.fixture
def tight(settings, folder, start):
    """A server with room for two of its six adapters."""
    return start(settings.model_copy(update={"adapters": folder, "max_resident_adapters": 2}))


@pytest.fixture
def threads():
    with ThreadPoolExecutor(40) as pool:
        yield pool


def ask(live, name):
    if name in GENERATORS:
        return live.complete(model=name, prompt="w1 w2 w3", max_tokens=6, temperature=0, ignore_eos=True)
    return live.classify(model=name, input="w1 w2 w3", return_routes=True)


def said(response):
    """Labels, texts and routes; the last digits of probabilities depend on the batch."""
    body = response.json()
    entries = body.get("data") or body["choices"]
    return [{**entry, "probs": None} for entry in entries], body["adapter_digest"]


def resident(live) -> list[str]:
    cards = live.http.get("/v1/adapters").json()["data"]
    return [card["name"] for card in cards if card["resident"]]


def evict(live, name) -> None:
    """Use others until it is gone."""
    for other in [other for other in CLASSIFIERS if other != name][:2]:
        assert ask(live, other).status_code == 200
    assert name not in resident(live)


def test_every_adapter_answers_as_if_all_were_in_memory(live, tight, threads):
    names = [*CLASSIFIERS, *GENERATORS]
    expected = {name: said(ask(live, name)) for name in names}
    assert set(names) <= set(resident(live))
    for name, answer in zip(names * 5, threads.map(lambda name: ask(tight, name), names * 5), strict=True):
        assert answer.status_code == 200, answer.text
        assert said(answer) == expected[name]
        assert answer.headers["x-adapter-digest"] == expected[name][1]
    assert len(resident(tight)) <= 2
    metrics = tight.metrics()
    evictions = sum(metrics[f'molex_adapter_evictions_total{{base="{base}"}}'] for base in ("enc", "dec"))
    loads = sum(
        metrics[f'molex_cold_load_seconds_count{{base="{base}",result="loaded"}}'] for base in ("enc", "dec")
    )
    assert loads >= 4
    assert evictions >= 4
    assert metrics['molex_registered_adapters{base="enc"}'] == 3
    in_memory = sum(metrics[f'molex_resident_adapters{{base="{base}"}}'] for base in ("enc", "dec"))
    assert in_memory == len(resident(tight))


def test_a_herd_of_requests_reads_once_and_blocks_nobody_else(tight, threads, monkeypatch):
    evict(tight, "mood")
    store, go, reads = tight.engine.adapters, Event(), []
    read_again = store.read_again

    def held(served):
        reads.append(served.name)
        assert go.wait(60)
        return read_again(served)

    monkeypatch.setattr(store, "read_again", held)
    herd = [threads.submit(ask, tight, "mood") for _ in range(32)]
    try:
        # While the read hangs, those that are in memory answer.
        assert ask(tight, resident(tight)[-1]).status_code == 200
        assert tight.embed(model="enc", input="w1").status_code == 200
    finally:
        go.set()
    assert {answer.result().status_code for answer in herd} == {200}
    assert reads == ["mood"]


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_folder_that_is_no_longer_what_it_was_fails_alone(tight, folder, damage):
    digest = ask(tight, "mood").json()["adapter_digest"]
    evict(tight, "mood")
    spoilt = folder / "mood"
    spoilt.rename(folder.parent / "mood")
    if damage == "changed":
        shutil.copytree(folder / "rank2", spoilt)
    neighbours = resident(tight)
    for _ in range(2):
        answer = ask(tight, "mood")
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (409, "adapter_unavailable", "model")
        assert "'mood'" in error["message"]
        assert str(folder.parent) not in answer.text
    assert ask(tight, neighbours[-1]).status_code == 200
    assert tight.http.get("/v1/adapters/mood").json()["digest"] == digest
    assert tight.metrics()['molex_cold_load_seconds_count{base="enc",result="failed"}'] == 2
    if damage == "changed":
        assert tight.http.put("/v1/adapters/mood?wait=60", json={"source": "mood"}).status_code == 200
        assert ask(tight, "mood").json()["adapter_digest"] != digest
    else:
        (folder.parent / "mood").rename(spoilt)
        assert ask(tight, "mood").json()["adapter_digest"] == digest


def test_who_cannot_wait_for_a_cold_load_hears_it_in_time(tight, monkeypatch):
    evict(tight, "mood")
    store, go = tight.engine.adapters, Event()
    read_again = store.read_again
    monkeypatch.setattr(store, "read_again", lambda served: go.wait(60) and read_again(served))
    late = tight.http.post(
        "/v1/classify", json={"model": "mood", "input": "w1"}, headers={"x-request-timeout": "1"}
    )
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    go.set()
    assert ask(tight, "mood").status_code == 200


def test_requests_in_flight_keep_their_weights_and_others_wait_for_the_room(tight, threads, brake):
    expected = {name: said(ask(tight, name)) for name in ("mood", "rank2", "topic")}
    braked = brake(tight, "enc")
    first = [threads.submit(ask, tight, name) for name in ("mood", "rank2")]
    braked.until(lambda: len(tight.engine._adapters_in_use(["enc"])) == 2)
    waiting = threads.submit(ask, tight, "topic")
    braked.until(lambda: len(tight.engine.loader._loads) == 1)
    assert sorted(resident(tight)) == ["mood", "rank2"]
    assert not waiting.done()
    braked.release()
    assert [said(answer.result()) for answer in first] == [expected["mood"], expected["rank2"]]
    assert said(waiting.result()) == expected["topic"]


def test_what_is_deleted_takes_memory_until_its_requests_have_ended(tight, threads, brake):
    nbytes = tight.http.get("/v1/adapters/mood").json()["bytes"]
    expected = said(ask(tight, "mood"))
    leaving = 'molex_memory_bytes{base="enc",kind="leaving_adapters"}'
    braked = brake(tight, "enc")
    running = threads.submit(ask, tight, "mood")
    braked.until(lambda: len(tight.engine._adapters_in_use(["enc"])) == 1)
    assert tight.metrics()[leaving] == 0
    assert tight.http.delete("/v1/adapters/mood").status_code == 204
    assert tight.metrics()[leaving] == nbytes
    braked.release()
    assert said(running.result()) == expected
    assert tight.metrics()[leaving] == 0


def banked(live) -> list[str]:
    """The adapters of the encoder whose factors are in its bank."""
    store, bank = live.engine.adapters, live.engine.bases["enc"].model.bank
    return [served.name for served in store.residents("enc") if store.weights(served).lora in bank]


def test_a_bank_holds_what_ran_last_and_keeps_what_is_pinned(settings, folder, start):
    """In float64 PyTorch runs the layers. There is room in the bank for one of the encoder's adapters."""
    rank, modules = 4, ("query", "value")
    room = rank * LAYERS * len(modules) * 2 * HIDDEN * torch.float64.itemsize
    live = start(settings.model_copy(update={"adapters": folder, "max_bank_bytes": room}))
    expected = {}
    for name in ("mood", "rank2", "mood"):
        expected[name] = said(ask(live, name))
        assert banked(live) == [name]
    assert live.metrics()['molex_memory_bytes{base="enc",kind="bank"}'] == room
    live.http.put("/v1/adapters/mood?wait=60", json={"source": "mood", "pinned": True}).raise_for_status()
    for name in ("mood", "rank2", "mood"):
        assert said(ask(live, name)) == expected[name]
        assert banked(live) == ["mood"]


def test_a_pinned_adapter_is_never_read_again(tight):
    card = tight.http.put("/v1/adapters/mood?wait=60", json={"source": "mood", "pinned": True}).json()
    assert (card["pinned"], card["resident"]) == (True, True)
    for name in ("topic", "rank2", "judge", "writer", "mood"):
        assert ask(tight, name).status_code == 200
        assert "mood" in resident(tight)
    second = tight.http.put("/v1/adapters/topic?wait=60", json={"source": "topic", "pinned": True})
    assert (second.status_code, second.json()["error"]["code"]) == (409, "too_many_adapters")


def test_a_load_begins_beside_tokenization(tight, monkeypatch):
    """Tokenizing waits for the read here: one after the other would never end."""
    evict(tight, "mood")
    store, tokenization = tight.engine.adapters, tight.engine.bases["enc"].tokenization
    begun, read_again, encode = Event(), store.read_again, tokenization.encode

    def read(served):
        begun.set()
        return read_again(served)

    def encode_after(*arguments, **options):
        assert begun.wait(60)
        return encode(*arguments, **options)

    monkeypatch.setattr("server.routes.prompts.SHORT_CHARACTERS", 0)
    monkeypatch.setattr(store, "read_again", read)
    monkeypatch.setattr(tokenization, "encode", encode_after)
    assert ask(tight, "mood").status_code == 200
