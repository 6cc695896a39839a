"""Servers in processes of their own: what outlives them, and sources that are on the network."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import Thread

import boto3
import httpx
import pytest
from moto.server import ThreadedMotoServer
from typer.testing import CliRunner

from molex.adapter_file import CONFIG_NAME, WEIGHTS_NAME, read_files
from scripts.postgres import find_binaries, private_cluster
from server.cli import app
from tests.server.conftest import PEPPER
from tests.server.processes import started, stopped
from tests.server.registry.hub import Hub, serving_hub

NAMES = ("mood", "topic", "rank2")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MOLEX_LOG_LEVEL": "warning"}
SPAWNED = multiprocessing.get_context("spawn")
"""Processes that import everything themselves."""


@pytest.fixture
def options(bases, tmp_path) -> list[str]:
    """A server on the encoder, with a storage of this test."""
    return ["--base", f"enc={bases['enc']}", "--storage", f"{tmp_path}/storage", "--precision", "fp64"]


@pytest.fixture
def contents(adapters_folder) -> dict[str, dict[str, bytes]]:
    """The files of each adapter."""
    return {
        name: {file: (adapters_folder / name / file).read_bytes() for file in (CONFIG_NAME, WEIGHTS_NAME)}
        for name in NAMES
    }


@pytest.fixture
def hub(contents) -> Iterator[Hub]:
    with serving_hub() as hub:
        for name in NAMES:
            hub.push(f"acme/{name}", contents[name])
        yield hub


def put(http: httpx.Client, name: str, source: str, **body: object) -> httpx.Response:
    return http.put(f"/v1/adapters/{name}?wait=60", json={"source": source} | body)


def digest_of(http: httpx.Client, model: str) -> str:
    answer = http.post("/v1/classify", json={"model": model, "input": "w1 w2"})
    assert answer.status_code == 200, answer.text
    return answer.json()["adapter_digest"]


def settled(http: httpx.Client) -> dict[str, dict]:
    """Every adapter by name, once no load is under way; each look takes a round trip."""
    for _ in range(20_000):
        cards = {card["name"]: card for card in http.get("/v1/adapters").json()["data"]}
        if all(card["state"] in ("ready", "failed") for card in cards.values()):
            return cards
    raise AssertionError("a load never ended")


class Changes(Thread):
    """Loads, rolls back and removes until its server is gone; `done` has what was answered."""

    def __init__(self, url: str, contents: dict[str, dict[str, bytes]], seed: int) -> None:
        super().__init__()
        self.done: list[tuple[str, dict]] = []
        self._url, self._contents, self._random = url, contents, random.Random(seed)

    def run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as http:
            try:
                while True:
                    name = f"x{self._random.randrange(4)}"
                    if self._random.random() < 0.2:
                        http.delete(f"/v1/adapters/{name}")
                        self.done.append((name, {}))
                        continue
                    files = self._contents[self._random.choice(NAMES)]
                    answer = http.put(f"/v1/adapters/{name}?wait=60", files=files)
                    self.done.append((name, answer.json()))
            except httpx.TransportError:
                return


def current(card: dict | None) -> str | None:
    """The digest that a name means, if it means any."""
    return (card or {}).get("digest")


def check_disk(storage: Path) -> set[str]:
    """The digests in a storage folder, each of which has whole files under its name."""
    folders = list(storage.glob("sha256-*"))
    for folder in folders:
        assert read_files(folder).digest == folder.name.replace("-", ":", 1)
    return {folder.name.replace("-", ":", 1) for folder in folders}


def test_a_server_that_is_killed_at_any_point_leaves_a_sound_catalogue(options, contents, tmp_path):
    moments = random.Random(7)
    storage = tmp_path / "storage"
    expected: dict[str, dict] = {}
    for attempt in range(3):
        with (
            started(ENVIRONMENT, *options) as (child, urls),
            httpx.Client(base_url=urls[0], timeout=60) as http,
        ):
            cards = settled(http)
            assert not list(storage.glob(".unfinished-*"))
            for name, card in cards.items():
                assert card["state"] == "ready", card
                for version in card["versions"]:
                    assert digest_of(http, f"{name}@{version['version']}") == version["digest"]
            # Nothing that was answered is lost; of the request that was cut off all is there or nothing.
            changed = [name for name, told in expected.items() if current(cards.get(name)) != current(told)]
            assert len(changed) <= 1
            named = {version["digest"] for card in cards.values() for version in card["versions"]}
            assert check_disk(storage) == named
            changes = Changes(urls[0], contents, attempt)
            changes.start()
            enough = moments.randrange(3, 12)
            while len(changes.done) < enough:
                http.get("/livez")
            for _ in range(moments.randrange(8)):
                http.get("/livez")
            child.kill()
            changes.join()
            expected |= changes.done
        check_disk(storage)


def test_adapters_of_a_hub_are_fetched_kept_and_fetched_again(options, hub, contents, tmp_path, monkeypatch):
    size = max(sum(map(len, files.values())) for files in contents.values())
    room = ["--max-storage-bytes", str(size), "--max-resident-adapters", "1"]
    # The library of the hub reads these when it is imported.
    for name, value in {"ENDPOINT": hub.url, "HUB_OFFLINE": "0", "HOME": f"{tmp_path}/hf"}.items():
        monkeypatch.setenv(f"HF_{name}", value)
    start = partial(started, ENVIRONMENT, *options, "--source", "hf://acme/", *room, processes=SPAWNED)
    with start() as (child, urls):
        with httpx.Client(base_url=urls[0], timeout=60) as http:
            refused = put(http, "x", "hf://other/mood")
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden_source")
            assert put(http, "x", "hf://acme/nothing").status_code == 400
            assert put(http, "x", "hf://acme/mood@nothing").status_code == 400
            hub.push("acme/empty", {CONFIG_NAME: b"{}"})
            assert put(http, "x", "hf://acme/empty").status_code == 400
            card = put(http, "mood", "hf://acme/mood").json()
            commit = hub.repositories["acme/mood"]["main"]
            assert card["source"] == f"hf://acme/mood@{commit}"
            assert put(http, "topic", "hf://acme/topic@main").status_code == 201
            # There is room for one of them on the disk, and in memory: the other is fetched again.
            assert len(check_disk(tmp_path / "storage")) == 1
            hub.push("acme/mood", contents["rank2"])
            assert digest_of(http, "mood") == card["digest"]
            assert hub.downloads[f"acme/mood/{WEIGHTS_NAME}"] == 2
            # What its commit names has changed: no other weights are served under the old digest.
            assert digest_of(http, "topic").startswith("sha256:")
            hub.commits[commit] = contents["rank2"]
            spoilt = http.post("/v1/classify", json={"model": "mood", "input": "w1"})
            assert (spoilt.status_code, spoilt.json()["error"]["code"]) == (409, "adapter_unavailable")
            hub.commits[commit] = contents["mood"]
        stopped(child)
    downloads = hub.downloads.total()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with start() as (child, urls):
        with httpx.Client(base_url=urls[0], timeout=60) as http:
            # The hub is down: what is on the disk serves, and the other says why it does not.
            assert digest_of(http, "topic").startswith("sha256:")
            down = http.post("/v1/classify", json={"model": "mood", "input": "w1"})
            assert (down.status_code, down.json()["error"]["code"]) == (503, "source_unavailable")
            assert put(http, "y", "hf://acme/rank2").json()["error"]["code"] == "source_unavailable"
            card = http.get("/v1/adapters/y").json()
            assert (card["state"], card["version"]) == ("failed", None)
            assert digest_of(http, "topic").startswith("sha256:")
        stopped(child)
    assert hub.downloads.total() == downloads


@pytest.fixture
def bucket(contents, monkeypatch) -> Iterator[str]:
    """The URL of an object store with the bucket `adapters`, in which `acme/mood` is an adapter."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
    )
    client.create_bucket(Bucket="adapters")
    for file, content in contents["mood"].items():
        client.put_object(Bucket="adapters", Key=f"acme/mood/{file}", Body=content)
    client.close()
    yield url
    server.stop()


def test_a_tenant_loads_from_its_own_part_of_an_object_store(options, bucket, tmp_path):
    database = f"sqlite:///{tmp_path}/catalogue.db"
    credentials = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    environment = ENVIRONMENT | credentials | {"AWS_ENDPOINT_URL": bucket, **catalogue(database)}
    keys = {tenant: new_key(environment, tenant) for tenant in ("acme", "other")}
    with started(environment, *options, "--source", "s3://adapters/{tenant}/") as (child, urls):
        with httpx.Client(base_url=urls[0], timeout=60) as http:
            http.headers["authorization"] = f"Bearer {keys['acme']}"
            answer = put(http, "mood", "s3://adapters/acme/mood")
            assert answer.status_code == 201, answer.text
            assert digest_of(http, "acme/mood") == answer.json()["digest"]
            assert put(http, "x", "s3://adapters/acme/nothing").status_code == 400
            http.headers["authorization"] = f"Bearer {keys['other']}"
            refused = put(http, "mood", "s3://adapters/acme/mood")
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden_source")
        assert "Traceback" not in stopped(child)


def catalogue(database: str) -> dict[str, str]:
    return {"MOLEX_DATABASE": database, "MOLEX_PEPPER": PEPPER}


def new_key(environment: dict[str, str], tenant: str) -> str:
    """A key of a tenant for everything."""

    def molex(*arguments: str) -> str:
        result = CliRunner().invoke(app, arguments, env=environment)
        assert result.exit_code == 0, result.output
        return result.stdout.strip()

    molex("tenant", "set", tenant)
    return molex("key", "create", "--tenant", tenant, "--scopes", "infer,adapters:read,adapters:write")


def test_adapters_serve_while_the_database_is_down(options, contents):
    if (binaries := find_binaries()) is None:
        pytest.skip("no PostgreSQL server is installed")
    with ExitStack() as stack, ExitStack() as up:
        environment = ENVIRONMENT | catalogue(up.enter_context(private_cluster(binaries)))
        key = new_key(environment, "acme")
        child, urls = stack.enter_context(started(environment, *options, "--max-resident-adapters", "1"))
        headers = {"authorization": f"Bearer {key}"}
        http = stack.enter_context(httpx.Client(base_url=urls[0], timeout=60, headers=headers))
        digests = {
            name: http.put(f"/v1/adapters/{name}?wait=60", files=contents[name]).json()["digest"]
            for name in ("mood", "topic")
        }
        up.close()
        # One of them is in memory, the other on the disk.
        for name in ("mood", "topic", "mood"):
            assert digest_of(http, name) == digests[name]
        assert http.get("/v1/adapters/mood").json()["digest"] == digests["mood"]
        refused = http.put("/v1/adapters/rank2?wait=60", files=contents["rank2"])
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "catalogue_unavailable")
        assert http.put("/v1/adapters/mood/aliases/prod", json={"version": 1}).status_code == 503
        assert http.delete("/v1/adapters/mood").status_code == 503
        assert digest_of(http, "mood") == digests["mood"]
        stopped(child)
