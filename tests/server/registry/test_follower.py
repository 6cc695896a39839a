"""Two servers on one catalogue: each serves what the other has changed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from threading import Event
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from molex.adapter_file import CONFIG_NAME, WEIGHTS_NAME, AdapterFiles, read_files
from server.catalogue.catalogue import Catalogue
from server.catalogue.records import Scope
from server.errors import ErrorKind, ServiceError
from tests.server.conftest import PEPPER, Live

on_sqlite = pytest.mark.parametrize("empty_url", ["sqlite"], indirect=True)
"""For what does not depend on the database."""


@dataclass
class Source:
    """Stands for a model hub: `hf://acme/NAME` is an adapter of the tests. It may be down."""

    folder: Path
    down: bool = False
    fetched: list[str] = field(default_factory=list)

    def fetch(self, uri: str) -> tuple[AdapterFiles, str]:
        if self.down:
            raise ServiceError(ErrorKind.SOURCE_DOWN, f"{uri} cannot be fetched for now", retry_after=5)
        self.fetched.append(uri)
        return read_files(self.folder / uri.removeprefix("hf://acme/")), uri


@dataclass
class Replica:
    live: Live
    http: httpx.Client
    source: Source

    def put(self, name: str, source: str, **body: str) -> httpx.Response:
        return self.http.put(f"/v1/adapters/{name}?wait=60", json={"source": f"hf://acme/{source}"} | body)

    def upload(self, name: str, folder: Path, wait: int = 60) -> httpx.Response:
        files = {file: (folder / file).read_bytes() for file in (CONFIG_NAME, WEIGHTS_NAME)}
        return self.http.put(f"/v1/adapters/{name}?wait={wait}", files=files)

    def card(self, name: str) -> dict[str, Any]:
        card: dict[str, Any] = self.http.get(f"/v1/adapters/{name}").json()
        return card

    def classify(self, model: str) -> httpx.Response:
        return self.http.post("/v1/classify", json={"model": model, "input": "w1 w2"})

    def digest(self, model: str) -> str | None:
        """Of what answers under a name, if anything does."""
        return self.classify(model).headers.get("x-adapter-digest")

    def until(self, name: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The card of an adapter, once it is so; each look takes a round trip."""
        for _ in range(20_000):
            if condition(card := self.card(name)):
                return card
        raise AssertionError(f"it never happened: {card}")


@pytest.fixture
def replica(url, settings, adapters_folder, tmp_path, start, monkeypatch) -> Iterator[Callable[[], Replica]]:
    """Starts servers with a storage each."""
    monkeypatch.setattr("server.catalogue.changes.REFRESH_SECONDS", 0.01)
    monkeypatch.setattr("server.registry.follower.RETRY_SECONDS", 0.01)

    async def new_token() -> str:
        catalogue = Catalogue(url, PEPPER)
        await catalogue.set_tenant("acme", {}, actor="test")
        _, token = await catalogue.create_key("acme", frozenset(Scope), actor="test")
        await catalogue.close()
        return token

    database = url.render_as_string(hide_password=False)
    changes = {
        "database": database,
        "pepper": SecretStr(PEPPER),
        "sources": ("hf://acme/",),
        "adapters": None,
    }
    headers = {"authorization": f"Bearer {asyncio.run(new_token())}"}
    with ExitStack() as stack:

        def begin() -> Replica:
            storage = Path(mkdtemp(prefix="storage-", dir=tmp_path))
            live = start(settings.model_copy(update=changes | {"storage": storage}))
            source = Source(adapters_folder)
            monkeypatch.setattr(live.registry.remote, "fetch", source.fetch)
            http = stack.enter_context(httpx.Client(base_url=live.url, headers=headers, timeout=60))
            return Replica(live, http, source)

        yield begin


@pytest.fixture
def replicas(replica) -> list[Replica]:
    return [replica(), replica()]


def test_what_one_server_changes_the_other_serves(replicas):
    first, second = replicas
    digests = [first.put("x", source).json()["digest"] for source in ("mood", "topic")]
    card = second.until("x", lambda card: card.get("version") == 2)
    assert (card["state"], card["resident"], card["digest"]) == ("ready", True, digests[1])
    assert [second.digest(model) for model in ("x", "x@1", "x@2")] == [digests[1], *digests]
    first.http.put("/v1/adapters/x/aliases/prod", json={"version": 1})
    second.until("x", lambda card: card["aliases"] == {"prod": 1})
    assert second.digest("x@prod") == digests[0]
    # And the other way round.
    second.http.post("/v1/adapters/x/rollback", json={})
    first.until("x", lambda card: card["version"] == 1)
    assert first.digest("x") == digests[0]
    second.http.delete("/v1/adapters/x/versions/2")
    first.until("x", lambda card: len(card["versions"]) == 1)
    assert first.classify("x@2").status_code == 404
    second.http.delete("/v1/adapters/x")
    first.until("x", lambda card: "error" in card)
    assert first.classify("x").status_code == 404
    first.until("x", lambda _: not first.live.registry.storage.digests())


@on_sqlite
def test_nobody_is_refused_while_versions_change_elsewhere(replicas):
    first, second = replicas
    digest = first.put("x", "mood").json()["digest"]
    second.until("x", lambda card: card.get("version") == 1)
    for source in ("topic", "rank2", "mood"):
        before, digest = digest, first.put("x", source).json()["digest"]
        answers = [second.digest("x")]
        while answers[-1] == before:
            answers.append(second.digest("x"))
        assert answers[-1] == digest


@on_sqlite
def test_a_name_that_is_removed_and_given_anew_elsewhere(replicas):
    first, second = replicas
    first.put("x", "mood")
    second.until("x", lambda card: card.get("version") == 1)
    first.http.delete("/v1/adapters/x")
    again = first.put("x", "topic").json()
    assert again["version"] == 1
    second.until("x", lambda card: card.get("digest") == again["digest"])
    assert second.digest("x") == second.digest("x@1") == again["digest"]


@on_sqlite
def test_a_load_that_fails_elsewhere_says_so_here(replicas):
    first, second = replicas
    assert first.put("x", "writer", base="enc").status_code == 400
    card = second.until("x", lambda card: card.get("state") == "failed")
    assert card["reason"] == first.card("x")["reason"] != ""


@on_sqlite
def test_what_was_sent_elsewhere_leaves_the_version_before(replicas, adapters_folder):
    first, second = replicas
    before = first.put("x", "mood").json()["digest"]
    second.until("x", lambda card: card.get("version") == 1)
    sent = first.upload("x", adapters_folder / "topic").json()
    card = second.until("x", lambda card: card["state"] == "failed")
    assert (card["version"], card["digest"]) == (1, before)
    assert card["reason"] == "the files of version 2 are on the server that loaded it alone"
    assert [version["state"] for version in card["versions"]] == ["ready", "failed"]
    assert second.digest("x") == before
    assert second.classify("x@2").json()["error"]["code"] == "adapter_unavailable"
    # Another change here does not bring it either.
    assert second.http.put("/v1/adapters/x/aliases/prod", json={"version": 1}).status_code == 200
    assert second.digest("x") == before
    # Its files do.
    again = second.upload("x", adapters_folder / "topic").json()
    assert (again["version"], again["state"], again["reason"]) == (2, "ready", None)
    assert second.digest("x") == sent["digest"]


@on_sqlite
def test_a_roll_back_elsewhere_ends_what_could_not_be_served(replicas, adapters_folder):
    first, second = replicas
    first.put("x", "mood")
    second.until("x", lambda card: card.get("version") == 1)
    first.upload("x", adapters_folder / "topic")
    second.until("x", lambda card: card["state"] == "failed")
    first.http.post("/v1/adapters/x/rollback", json={})
    card = second.until("x", lambda card: card["state"] == "ready")
    assert (card["version"], card["reason"]) == (1, None)


@on_sqlite
def test_what_was_only_ever_sent_elsewhere_is_named(replicas, adapters_folder):
    first, second = replicas
    first.upload("x", adapters_folder / "mood")
    card = second.until("x", lambda card: card.get("state") == "failed")
    assert card["reason"] == "the files of version 1 are on the server that loaded it alone"
    assert second.classify("x").json()["error"]["code"] == "adapter_unavailable"
    assert first.digest("x") == card["versions"][0]["digest"]


@on_sqlite
def test_an_upload_under_way_is_left_to_the_server_that_has_it(replica, adapters_folder, monkeypatch):
    first, go = replica(), Event()
    sources = first.live.engine.adapters.sources
    fit = sources.fit
    monkeypatch.setattr(sources, "fit", lambda *arguments: go.wait(60) and fit(*arguments))
    assert first.upload("x", adapters_folder / "mood", wait=0).status_code == 202
    try:
        second = replica()
        assert second.card("x")["state"] in ("registered", "loading")
    finally:
        go.set()
    assert first.until("x", lambda card: card["state"] != "loading")["state"] == "ready"
    assert second.put("x", "topic").json()["version"] == 2


@on_sqlite
def test_a_source_that_is_down_is_asked_again(replicas):
    first, second = replicas
    digests = [first.put("x", "mood").json()["digest"]]
    second.until("x", lambda card: card.get("version") == 1)
    second.source.down = True
    digests.append(first.put("x", "topic").json()["digest"])
    card = second.until("x", lambda card: card["state"] == "failed")
    assert "cannot be fetched for now" in card["reason"]
    assert second.digest("x") == digests[0]
    second.source.down = False
    card = second.until("x", lambda card: card["state"] == "ready")
    assert (card["version"], second.digest("x")) == (2, digests[1])


@on_sqlite
def test_changes_do_not_wait_for_the_loads_of_what_leaves(replicas, monkeypatch):
    first, second = replicas
    registry = second.live.registry
    held = []
    collect = registry.collect

    async def look(leaving=frozenset()):
        held.append(registry.changing.locked())
        await collect(leaving)

    monkeypatch.setattr(registry, "collect", look)
    first.put("x", "mood")
    second.until("x", lambda card: card.get("version") == 1)
    first.http.delete("/v1/adapters/x")
    second.until("x", lambda card: "error" in card)
    while not held:
        second.card("x")
    assert held == [False]


@on_sqlite
def test_a_server_fetches_nothing_for_its_own_changes(replicas):
    first, second = replicas
    for source in ("mood", "topic", "mood"):
        first.put("x", source)
    second.until("x", lambda card: card.get("version") == 1 and len(card["versions"]) == 2)
    assert first.source.fetched == ["hf://acme/mood", "hf://acme/topic", "hf://acme/mood"]
