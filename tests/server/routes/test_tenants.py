"""Tenants beside one another: neither sees or touches what is the other's."""

from __future__ import annotations

import asyncio
import json
from itertools import chain

import httpx
import pytest

from molex.adapter_file import CONFIG_NAME, WEIGHTS_NAME
from scripts.api_page import document
from server.catalogue.catalogue import Catalogue
from server.catalogue.url import parse_url
from tests.server.conftest import PEPPER


def names(client: httpx.Client, path: str, field: str) -> set[str]:
    return {card[field] for card in client.get(path).json()["data"]}


def test_lists_show_ones_own_and_what_is_shared(acme, other):
    assert {"acme/secret", "topic", "enc"} <= names(acme, "/v1/models", "id")
    assert {"acme/secret", "topic"} <= names(acme, "/v1/adapters", "name")
    for path, field in (("/v1/models", "id"), ("/v1/adapters", "name")):
        assert not any(name.startswith("acme/") for name in names(other, path, field))


def test_a_short_name_is_ones_own_before_the_shared_one(acme, other):
    shared = acme.post("/v1/classify", json={"model": "topic", "input": "w1"}).json()
    assert acme.put("/v1/adapters/topic?wait=60", json={"source": "secret"}).status_code == 201
    own = acme.post("/v1/classify", json={"model": "topic", "input": "w1"}).json()
    full = acme.post("/v1/classify", json={"model": "acme/topic", "input": "w1"}).json()
    theirs = other.post("/v1/classify", json={"model": "topic", "input": "w1"}).json()
    assert acme.delete("/v1/adapters/topic").status_code == 204
    assert own["adapter_digest"] == full["adapter_digest"] != shared["adapter_digest"]
    assert theirs["adapter_digest"] == shared["adapter_digest"]
    again = acme.post("/v1/classify", json={"model": "topic", "input": "w1"}).json()
    assert again["adapter_digest"] == shared["adapter_digest"]


NAMING = [
    ("POST", "/v1/classify", {"model": "NAME", "input": "w1"}),
    ("POST", "/v1/completions", {"model": "NAME", "prompt": "w1"}),
    ("POST", "/v1/chat/completions", {"model": "NAME", "messages": [{"role": "user", "content": "w1"}]}),
    ("POST", "/v1/embeddings", {"model": "NAME", "input": "w1"}),
    ("POST", "/tei/NAME/predict", {"inputs": "w1"}),
    ("POST", "/predict?model=NAME", {"inputs": "w1"}),
    ("GET", "/tei/NAME/info", None),
    ("POST", "/classify", {"model": "NAME", "input": "w1"}),
    ("POST", "/tokenize", {"model": "NAME", "prompt": "w1"}),
    ("POST", "/detokenize", {"model": "NAME", "tokens": [1]}),
    ("GET", "/v2/models/NAME", None),
    ("GET", "/v2/models/NAME/ready", None),
    ("GET", "/v2/models/NAME/versions/1", None),
    ("GET", "/v2/models/NAME/versions/1/ready", None),
    ("POST", "/v2/models/NAME/infer", {"inputs": []}),
    ("POST", "/v2/models/NAME/versions/1/infer", {"inputs": []}),
    ("POST", "/v2/repository/models/NAME/load", {"parameters": {"source": "secret"}}),
    ("POST", "/v2/repository/models/NAME/unload", {}),
    ("GET", "/v1/models/NAME", None),
    ("GET", "/v1/adapters/NAME", None),
    ("DELETE", "/v1/adapters/NAME", None),
    ("PUT", "/v1/adapters/NAME", {"source": "secret"}),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "NAME"}),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "NAME", "lora_path": "secret"}),
    ("POST", "/tei/NAME/embed", {"inputs": "w1"}),
    ("POST", "/v1/adapters/NAME/rollback", {}),
    ("PUT", "/v1/adapters/NAME/aliases/prod", {"version": 1}),
    ("DELETE", "/v1/adapters/NAME/aliases/prod", None),
    ("DELETE", "/v1/adapters/NAME/versions/1", None),
]
"""Requests of every route that names an adapter."""


def test_the_walk_covers_every_route_with_a_name_in_its_path():
    meanings = {"{name}": "NAME", "{model}": "NAME", "{alias}": "prod", "{number}": "1", "{version}": "1"}
    paths = document()["paths"]
    for unnamed in ("/v1/tenants/{name}", "/v1/keys/{key_id}", "/tei/{model}/health"):
        del paths[unnamed]
    named = {(method.upper(), path) for path, item in paths.items() for method in item if "{" in path}
    for field, meaning in meanings.items():
        named = {(method, path.replace(field, meaning)) for method, path in named}
    assert named <= {(method, path) for method, path, _ in NAMING}


@pytest.mark.parametrize(("method", "path", "body"), NAMING)
def test_a_foreign_adapter_and_a_missing_one_look_the_same(acme, other, method, path, body):
    def ask(name: str) -> tuple[int, str, set[str]]:
        content = None if body is None else json.dumps(body).replace("NAME", name)
        headers = {"content-type": "application/json"}
        answer = other.request(method, path.replace("NAME", name), content=content, headers=headers)
        return answer.status_code, answer.text.replace(name, "NAME"), set(answer.headers)

    assert ask("acme/secret") == ask("acme/nothing")
    assert ask("acme/secret")[0] == 404
    assert acme.get("/v1/adapters/secret").status_code == 200


def test_the_repository_of_v2_shows_ones_own_and_what_is_shared(acme, other):
    def index(client: httpx.Client) -> set[str]:
        return {model["name"] for model in client.post("/v2/repository/index", json={}).json()}

    assert {"acme/secret", "topic", "enc"} <= index(acme)
    assert not any(name.startswith("acme/") for name in index(other))


@pytest.mark.parametrize("name", ["secret", "acme/secret", "acme%2Fsecret"])
def test_v2_knows_an_adapter_by_its_name_with_and_without_the_tenant(acme, name):
    tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["w1"]}
    card = acme.get(f"/v2/models/{name}").json()
    version = f"/v2/models/{name}/versions/{card['versions'][0]}"
    assert acme.get(version).json() == card
    for path in (f"/v2/models/{name}", version):
        assert acme.get(f"{path}/ready").status_code == 200
        assert acme.post(f"{path}/infer", json={"inputs": [tensor]}).json()["model_name"] == card["name"]
    assert acme.get(f"/v2/models/{name}/versions/1").status_code == 404


def test_v2_loads_and_unloads_ones_own(scene):
    client = scene[1]["other"]
    for name in ("topic", "other/topic", "other%2Ftopic"):
        assert client.post(f"/v2/repository/models/{name}/load", json={}).status_code == 200
        assert "other/topic" in names(client, "/v1/adapters", "name")
        assert client.post(f"/v2/repository/models/{name}/unload", json={}).status_code == 200
        assert "other/topic" not in names(client, "/v1/adapters", "name")
    refused = client.post("/v2/repository/models/mood/unload", json={})
    assert (refused.status_code, set(refused.json())) == (403, {"error"})


def test_a_model_that_need_not_be_named_is_one_of_those_the_caller_sees(scene, acme, other):
    """Every caller sees the shared classifiers; how many fit is counted for each alone."""
    counts = [
        int(client.post("/predict", json={"inputs": "w1"}).json()["error"].split()[0])
        for client in scene[1].values()
    ]
    assert counts[0] == counts[1] + 1
    told = [
        client.post("/classify", json={"input": "w1"}).json()["error"]["message"] for client in (acme, other)
    ]
    assert [int(text.split()[0]) for text in told] == counts


def test_a_tenant_cannot_tell_what_another_has_asked(acme, other):
    body = {"model": "dec", "prompt": "w1 w2 w3 w4 " * 12, "max_tokens": 1, "ignore_eos": True}

    def cached(client: httpx.Client) -> int:
        answer = client.post("/v1/completions", json=body).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached(acme) == 0
    assert cached(acme) > 0
    assert cached(other) == 0


def test_generations_of_a_flood_rest_and_say_what_they_say_alone(scene, acme, other, threads, monkeypatch):
    def ask(client: httpx.Client, prompt: str, max_tokens: int) -> str:
        body = {"model": "dec", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        answer = client.post("/v1/completions", json=body | {"ignore_eos": True})
        return answer.json()["choices"][0]["text"]

    prompts = [f"w{number} w2 " * 8 for number in range(16)]
    alone = [ask(other, prompt, 6) for prompt in prompts]
    runner, batches = scene[0].engine.bases["dec"].runner, []
    run = runner.run

    def recorded(sequences, part_tokens):
        batches.append(sequences)
        return run(sequences, part_tokens)

    monkeypatch.setattr(runner, "run", recorded)
    flood = [threads.submit(ask, other, prompt, 6) for prompt in prompts]
    while not all(answer.done() for answer in flood):
        ask(acme, "w1", 20)
    assert [answer.result() for answer in flood] == alone
    steps = [
        [number for number, batch in enumerate(batches) if sequence in batch]
        for sequence in {*chain(*batches)}
        if sequence.tenant == "other"
    ]
    assert any(numbers[-1] - numbers[0] >= len(numbers) for numbers in steps)


def test_what_is_shared_is_not_a_tenants_to_remove(acme):
    refused = acme.delete("/v1/adapters/mood")
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "forbidden_adapter"
    assert acme.get("/v1/adapters/mood").status_code == 200


@pytest.mark.parametrize("source", ["../other/secret", "..", "/etc", "../acme/../other/topic"])
def test_a_tenant_loads_from_its_own_folder_alone(acme, source):
    refused = acme.put("/v1/adapters/x?wait=60", json={"source": source})
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "forbidden_source"


def test_an_upload_that_would_not_outlive_the_server_is_refused(acme, adapters_folder):
    """The catalogue would name what is gone: this server has no storage folder."""
    files = {file: (adapters_folder / "mood" / file).read_bytes() for file in (CONFIG_NAME, WEIGHTS_NAME)}
    refused = acme.put("/v1/adapters/x?wait=60", files=files)
    assert refused.status_code == 403
    assert "start it with --storage" in refused.json()["error"]["message"]


def test_adapters_are_limited_in_number_and_bytes(acme):
    size = acme.get("/v1/adapters/secret").json()["bytes"]

    def put(name: str) -> tuple[int, str]:
        answer = acme.put(f"/v1/adapters/{name}?wait=60", json={"source": "secret"})
        return answer.status_code, answer.json().get("error", {}).get("code", "")

    assert acme.put("/v1/tenants/acme", json={"adapters": 1}).is_success
    assert put("second") == (409, "adapter_quota_exceeded")
    assert put("secret") == (200, "")
    acme.put("/v1/tenants/acme", json={"adapters": None, "adapter_bytes": 2 * size - 1})
    assert put("second") == (409, "adapter_quota_exceeded")
    acme.put("/v1/tenants/acme", json={"adapter_bytes": 2 * size})
    assert put("second") == (201, "")
    assert acme.delete("/v1/adapters/second").status_code == 204
    acme.put("/v1/tenants/acme", json={"adapter_bytes": None})


def test_the_audit_log_tells_who_loaded_what_and_no_text(scene, acme):
    live, _ = scene
    acme.post("/v1/classify", json={"model": "secret", "input": "w1 w2 w3"})
    acme.delete("/v1/adapters/secret")
    catalogue = Catalogue(parse_url(live.engine.settings.database), PEPPER)

    async def read():
        try:
            return await catalogue.entries(), await catalogue.verify()
        finally:
            await catalogue.close()

    entries, (_, _, problem) = asyncio.run(read())
    assert problem is None
    of_adapter = [entry for entry in entries if entry.subject == "adapter:acme/secret"]
    assert [entry.action for entry in of_adapter[-2:]] == ["adapter.load", "adapter.remove"]
    digest = json.loads(of_adapter[-2].detail)["digest"]
    assert digest.startswith("sha256:")
    assert list(json.loads(of_adapter[-1].detail)["versions"].values()) == [digest]
    assert {len(entry.actor) for entry in of_adapter} == {16}
    assert "w1 w2" not in str(entries)
