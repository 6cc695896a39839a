"""Every route with no key, a bad key, a key without its scope, and the right one."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Event
from typing import Any

import httpx
import openai
import pytest
from fastapi import APIRouter, Depends, FastAPI
from pydantic import SecretStr

from scripts.api_page import application, document
from server.auth.access import PRIVATE
from server.catalogue.catalogue import Catalogue
from server.catalogue.database import migrate
from server.catalogue.records import Scope
from server.catalogue.url import parse_url
from server.routes.access import OPEN as LET_IN
from server.routes.access import register
from tests.server.conftest import PEPPER, Live, live_server

OPEN = {
    "/livez",
    "/readyz",
    "/health",
    "/tei/{model}/health",
    "/version",
    "/v2",
    "/v2/health/live",
    "/v2/health/ready",
}
SCOPES = {
    "/metrics": Scope.METRICS,
    "get /v1/adapters": Scope.ADAPTERS_READ,
    "get /v1/adapters/{name}": Scope.ADAPTERS_READ,
    "put /v1/adapters/{name}": Scope.ADAPTERS_WRITE,
    "delete /v1/adapters/{name}": Scope.ADAPTERS_WRITE,
    "/v1/adapters/{name}/rollback": Scope.ADAPTERS_WRITE,
    "/v1/adapters/{name}/aliases/{alias}": Scope.ADAPTERS_WRITE,
    "/v1/adapters/{name}/versions/{number}": Scope.ADAPTERS_WRITE,
    "/v1/load_lora_adapter": Scope.ADAPTERS_WRITE,
    "/v1/unload_lora_adapter": Scope.ADAPTERS_WRITE,
    "/v2/repository/index": Scope.ADAPTERS_READ,
    "/v2/repository/models/{model}/load": Scope.ADAPTERS_WRITE,
    "/v2/repository/models/{model}/unload": Scope.ADAPTERS_WRITE,
    "/v1/tenants": Scope.ADMIN,
    "/v1/tenants/{name}": Scope.ADMIN,
    "/v1/keys": Scope.ADMIN,
    "/v1/keys/{key_id}": Scope.ADMIN,
}


@dataclass
class Guarded:
    """A server with keys on two listeners, and keys for it by what they are for."""

    live: Live
    tokens: dict[str, str]

    def ask(self, method: str, path: str, key: str | None = None, **options: Any) -> httpx.Response:
        """Ask on the second listener, where every route answers."""
        headers = {} if key is None else {"authorization": f"Bearer {self.tokens[key]}"}
        return self.live.http.request(method, self.live.admin_url + path, headers=headers, **options)


async def make_tokens(catalogue: Catalogue, now: int) -> dict[str, str]:
    """A key for each scope, and bad ones."""
    await catalogue.set_tenant("acme", {}, actor="test")
    tokens = {}
    for scope in Scope:
        key = await catalogue.create_key(
            "acme", frozenset({scope}), actor="test", name=scope.replace(":", "-")
        )
        tokens[str(scope)] = key[1]
    everything = frozenset(Scope)
    tokens["all"] = (await catalogue.create_key("acme", everything, actor="test"))[1]
    revoked, tokens["revoked"] = await catalogue.create_key("acme", everything, actor="test", name="r")
    await catalogue.revoke(revoked.id, actor="test")
    _, tokens["expired"] = await catalogue.create_key(
        "acme", everything, actor="test", name="e", expires=now + 1
    )
    tokens["wrong"] = tokens["all"][:-4] + "zzzz"
    await catalogue.close()
    return tokens


@pytest.fixture(scope="module")
def guarded(settings, tmp_path_factory) -> Iterator[Guarded]:
    database = f"sqlite:///{tmp_path_factory.mktemp('catalogue')}/catalogue.db"
    url = parse_url(database)
    migrate(url)
    # Made at a time when the key that expires was still good.
    tokens = asyncio.run(make_tokens(Catalogue(url, PEPPER, lambda: 1000.0), 1000))
    changes = {"database": database, "pepper": SecretStr(PEPPER), "admin_port": 0}
    with live_server(settings.model_copy(update=changes)) as live:
        yield Guarded(live, tokens)


def operations() -> list[tuple[str, str]]:
    """Method and path template of every operation in the OpenAPI document."""
    return [(method, path) for path, item in document()["paths"].items() for method in item]


OPERATIONS = operations()
GUARDED = [(method, path) for method, path in OPERATIONS if path not in OPEN]


def needed(method: str, path: str) -> Scope:
    return SCOPES.get(path) or SCOPES.get(f"{method} {path}") or Scope.INFER


def filled(path: str) -> str:
    return re.sub(r"\{\w+\}", "nobody", path)


def test_the_walk_covers_every_scope():
    assert {needed(method, path) for method, path in GUARDED} == set(Scope)
    assert {path for _, path in OPERATIONS} >= OPEN | {path.split()[-1] for path in SCOPES}


@pytest.mark.parametrize("key", [None, "wrong", "expired", "revoked"])
@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_a_route_refuses_who_has_no_good_key(guarded, method, path, key):
    answer = guarded.ask(method, filled(path), key, content=b'{"junk"')
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    expected = "missing_api_key" if key is None else "invalid_api_key"
    error = answer.json()["error"]
    # Two dialects have no codes, vLLM's are numbers.
    assert "API key" in error if isinstance(error, str) else error["code"] in (expected, 401)


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_a_route_refuses_every_scope_but_its_own(guarded, method, path):
    scope = needed(method, path)
    for other in set(Scope) - {scope}:
        answer = guarded.ask(method, filled(path), str(other))
        assert answer.status_code == 403
        assert str(scope) in answer.text
    assert guarded.ask(method, filled(path), str(scope)).status_code not in (401, 403, 500)


@pytest.mark.parametrize(("method", "path"), [entry for entry in OPERATIONS if entry[1] in OPEN])
def test_probes_are_open(guarded, method, path):
    for key in (None, "wrong", "all"):
        assert guarded.ask(method, filled(path), key).status_code == 200


@pytest.mark.parametrize("path", ["/docs", "/openapi.json"])
def test_the_documentation_is_open(guarded, path):
    assert guarded.ask("get", path).status_code == 200


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_the_first_listener_has_nothing_private(guarded, method, path):
    key = {"authorization": f"Bearer {guarded.tokens['all']}"}
    answer = guarded.live.http.request(method, filled(path), headers=key)
    if needed(method, path) in PRIVATE:
        assert answer.status_code == 404
        assert "Not Found:" in answer.text
        assert path.startswith("/v2/") or answer.json()["error"]["code"] in ("not_found", 404)
    else:
        assert "Not Found:" not in answer.text


def test_the_body_of_a_stranger_is_not_read_and_the_connection_goes_on(guarded):
    with httpx.Client(base_url=guarded.live.url) as client:
        for _ in range(3):
            assert client.post("/v1/classify", content=b"x" * 1_000_000).status_code == 401
            assert client.get("/livez").status_code == 200


def test_keys_and_tenants_are_administered_over_http(guarded):
    made = guarded.ask("post", "/v1/keys", "admin", json={"tenant": "acme", "name": "n", "scopes": ["infer"]})
    assert made.status_code == 201
    card = made.json()
    guarded.tokens["new"] = card.pop("token")
    assert card in guarded.ask("get", "/v1/keys", "admin").json()["data"]
    assert guarded.ask("get", "/v1/models", "new").status_code == 200
    assert guarded.ask("delete", f"/v1/keys/{card['id']}", "admin").json()["revoked"] is not None
    assert guarded.ask("get", "/v1/models", "new").status_code == 401
    tenant = guarded.ask("put", "/v1/tenants/rich", "admin", json={"concurrency": 7}).json()
    assert tenant["quota"]["concurrency"] == 7
    assert tenant in guarded.ask("get", "/v1/tenants", "admin").json()["data"]
    assert guarded.ask("put", "/v1/tenants/A", "admin", json={}).status_code == 400
    assert (
        guarded.ask("post", "/v1/keys", "admin", json={"tenant": "x", "scopes": ["root"]}).status_code == 400
    )


def test_adapters_are_pinned_with_the_scope_admin_alone(guarded):
    body = {"source": "mood", "pinned": True}
    refused = guarded.ask("put", "/v1/adapters/x?wait=60", "adapters:write", json=body)
    assert refused.status_code == 403
    assert refused.json()["error"]["param"] == "pinned"
    assert guarded.ask("put", "/v1/adapters/x?wait=60", "all", json=body).json()["error"]["param"] == "source"


def test_a_limit_counts_from_the_next_request_on(guarded):
    assert guarded.ask("put", "/v1/tenants/acme", "admin", json={"requests_per_minute": 0}).status_code == 200
    refused = guarded.ask("get", "/v1/models", "infer")
    assert guarded.ask("put", "/v1/tenants/acme", "admin", json={"requests_per_minute": None}).is_success
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) > 0
    assert refused.json()["error"]["code"] == "quota_exceeded"
    assert guarded.ask("get", "/v1/models", "infer").status_code == 200


def test_openais_client_tells_refusals_apart(guarded):
    def refusal(key: str) -> tuple[type, str | None]:
        with openai.OpenAI(
            base_url=f"{guarded.live.url}/v1", api_key=guarded.tokens[key], max_retries=0
        ) as client:
            with pytest.raises(openai.APIStatusError) as caught:
                client.models.list()
            return type(caught.value), caught.value.code

    assert refusal("wrong") == (openai.AuthenticationError, "invalid_api_key")
    assert refusal("metrics") == (openai.PermissionDeniedError, "missing_scope")
    guarded.ask("put", "/v1/tenants/acme", "admin", json={"requests_per_minute": 0})
    refused = refusal("infer")
    guarded.ask("put", "/v1/tenants/acme", "admin", json={"requests_per_minute": None})
    assert refused == (openai.RateLimitError, "quota_exceeded")


def test_a_stream_counts_until_its_end(guarded, monkeypatch):
    runner = guarded.live.engine.bases["dec"].runner
    original, go = runner.run, Event()

    def run(sequences, part_tokens):
        assert all(len(sequence.output_ids) < 2 for sequence in sequences) or go.wait(60)
        return original(sequences, part_tokens)

    monkeypatch.setattr(runner, "run", run)
    guarded.ask("put", "/v1/tenants/acme", "admin", json={"concurrency": 1})
    body = {"model": "dec", "prompt": "w1", "max_tokens": 9, "ignore_eos": True, "stream": True}
    headers = {"authorization": f"Bearer {guarded.tokens['infer']}"}
    with httpx.stream("POST", f"{guarded.live.url}/v1/completions", json=body, headers=headers) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: {")
        refused = guarded.ask("get", "/v1/models", "infer")
        go.set()
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    later = (guarded.ask("get", "/v1/models", "infer").status_code for _ in range(1000))
    assert 200 in later
    guarded.ask("put", "/v1/tenants/acme", "admin", json={"concurrency": None})


def test_tokens_are_counted_with_those_that_may_be_generated(guarded):
    guarded.ask("put", "/v1/tenants/acme", "admin", json={"tokens_per_minute": 50})
    body = {"model": "dec", "prompt": "w1 w2", "max_tokens": 10}
    statuses = [guarded.ask("post", "/v1/completions", "infer", json=body).status_code for _ in range(5)]
    too_long = guarded.ask("post", "/v1/completions", "infer", json=body | {"max_tokens": 60})
    too_many = guarded.ask("post", "/v1/completions", "infer", json=body | {"n": 6})
    text = {"model": "mood", "input": "w1 " * 20}
    classified = guarded.ask("post", "/v1/classify", "infer", json=text)
    guarded.ask("put", "/v1/tenants/acme", "admin", json={"tokens_per_minute": None})
    assert statuses.count(429) >= 1
    assert statuses[0] == 200
    assert (too_long.status_code, too_many.status_code) == (400, 400)
    assert classified.status_code == 429


def test_a_route_that_declares_nothing_is_not_registered():
    router = APIRouter()

    @router.get("/forgotten")
    async def forgotten() -> None:
        """A route without a scope."""

    with pytest.raises(TypeError, match="/forgotten declares neither a scope nor OPEN"):
        register(FastAPI(), router)


def test_a_route_that_no_test_would_find_is_not_registered():
    router = APIRouter()

    @router.get("/hidden", dependencies=[LET_IN], include_in_schema=False)
    async def hidden() -> None:
        """A route for everybody."""

    with pytest.raises(TypeError, match="/hidden is not in the OpenAPI document"):
        register(FastAPI(), router)


def test_all_that_is_not_registered_is_documentation():
    """Routes that are registered come in routers, which have no path."""
    paths = {getattr(route, "path", None) for route in application().routes}
    assert paths == {None, "/docs", "/docs/oauth2-redirect", "/openapi.json", "/static-offline-docs"}


def test_a_route_with_a_dependency_that_would_run_on_a_thread_is_not_registered():
    router = APIRouter()

    def slow() -> None:
        """A plain function."""

    @router.get("/slow", dependencies=[LET_IN, Depends(slow)])
    async def answer() -> None:
        """A route for everybody."""

    with pytest.raises(TypeError, match=r"/slow: the dependency .*slow.* is not async"):
        register(FastAPI(), router)


def test_without_a_catalogue_everybody_may_do_everything_and_there_are_no_keys(live):
    assert live.http.get("/metrics").status_code == 200
    assert live.http.get("/v1/models", headers={"authorization": "Bearer any"}).status_code == 200
    missing = live.http.get("/v1/keys")
    assert missing.status_code == 404
    assert "--database" in missing.json()["error"]["message"]
