"""Adapters as a resource over HTTP: versions, aliases, roll back, uploads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event

import httpx
import pytest
from safetensors.torch import load_file, save_file

from server.registry import warm_up
from tests.server.conftest import Live
from tests.server.looks import waiting

FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(autouse=True)
def clean(live) -> Iterator[None]:
    """Leave the server as it was."""
    yield
    for card in live.http.get("/v1/adapters").json()["data"]:
        if card["version"] != 0:
            live.http.delete(f"/v1/adapters/{card['name']}")


@pytest.fixture
def put(live) -> Callable[..., httpx.Response]:
    def load(name: str, source: str, wait: float = 60, **body) -> httpx.Response:
        return live.http.put(f"/v1/adapters/{name}?wait={wait}", json={"source": source} | body)

    return load


def upload_to(live: Live, name: str, folder: Path, wait: float = 60, **fields: str) -> httpx.Response:
    files = {file: (folder / file).read_bytes() for file in FILES}
    return live.http.put(f"/v1/adapters/{name}?wait={wait}", files=files, data=fields)


@pytest.fixture
def upload(live) -> Callable[..., httpx.Response]:
    return partial(upload_to, live)


def digest_of(live: Live, model: str) -> str | None:
    answer = live.classify(model=model, input="w1 w2")
    return answer.json()["adapter_digest"] if answer.status_code == 200 else None


def code_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_every_load_is_a_version_and_the_newest_is_current(live, put):
    first, second = put("x", "mood"), put("x", "topic")
    assert (first.status_code, second.status_code) == (201, 200)
    card = second.json()
    assert (card["version"], card["state"], card["reason"]) == (2, "ready", None)
    assert [(v["version"], v["state"], v["source"]) for v in card["versions"]] == [
        (1, "ready", "mood"),
        (2, "ready", "topic"),
    ]
    digests = [version["digest"] for version in card["versions"]]
    assert card["versions"][0]["labels"] == {"0": "bad", "1": "fair", "2": "good"}
    assert [digest_of(live, name) for name in ("x@1", "x@2", "x")] == [*digests, digests[1]]
    assert digest_of(live, "x@3") is digest_of(live, "x@prod") is digest_of(live, "x@") is None


def test_a_load_is_accepted_before_it_is_done(live, put, monkeypatch):
    go = Event()
    sources = live.engine.adapters.sources
    fit = sources.fit
    monkeypatch.setattr(sources, "fit", lambda *arguments: go.wait(60) and fit(*arguments))
    accepted = put("x", "mood", wait=0)
    try:
        assert accepted.status_code == 202
        assert accepted.headers["location"] == "/v1/adapters/x"
        assert accepted.json()["state"] in ("registered", "loading")
        assert (accepted.json()["version"], accepted.json()["digest"]) == (None, None)
        while (card := live.http.get("/v1/adapters/x").json())["state"] == "registered":
            pass
        assert (card["state"], card["versions"][0]["state"]) == ("loading", "loading")
        assert code_of(live.classify(model="x", input="w1")) == (404, "model_not_found")
        # The same request joins the load that is under way, another one has to wait.
        assert put("x", "mood", wait=0.1).status_code == 202
        assert code_of(put("x", "topic")) == (409, "load_in_progress")
    finally:
        go.set()
    assert put("x", "mood").status_code in (200, 201)
    assert [v["version"] for v in live.http.get("/v1/adapters/x").json()["versions"]] == [1]


def test_the_same_files_make_no_new_version(put, upload, adapters_folder):
    card = put("x", "mood").json()
    for response in (put("x", "mood"), upload("x", adapters_folder / "mood")):
        assert response.status_code == 200
        assert response.json()["digest"] == card["digest"]
        assert [version["version"] for version in response.json()["versions"]] == [1]
    put("x", "topic")
    back = put("x", "mood").json()
    assert (back["version"], len(back["versions"])) == (1, 2)


def test_a_rollback_and_an_alias(live, put):
    for source in ("mood", "topic", "rank2"):
        digest = put("x", source).json()["digest"]
    cards = live.http.get("/v1/adapters/x").json()["versions"]
    assert live.post("/v1/adapters/x/rollback", {}).json()["version"] == 2
    assert digest_of(live, "x") == cards[1]["digest"] != digest
    assert live.http.put("/v1/adapters/x/aliases/prod", json={"version": 3}).json()["aliases"] == {"prod": 3}
    assert digest_of(live, "x@prod") == digest
    assert live.post("/v1/adapters/x/rollback", {"version": "prod"}).json()["version"] == 3
    assert live.http.post("/v1/adapters/x/rollback").json()["version"] == 2
    assert live.post("/v1/adapters/x/rollback", {"version": 1}).json()["version"] == 1
    assert code_of(live.post("/v1/adapters/x/rollback", {})) == (409, "no_previous_version")
    assert code_of(live.post("/v1/adapters/x/rollback", {"version": 9})) == (404, "adapter_not_found")
    moved = live.http.put("/v1/adapters/x/aliases/prod", json={"version": 2})
    assert (moved.status_code, moved.json()["aliases"]) == (200, {"prod": 2})
    assert code_of(live.http.delete("/v1/adapters/x/versions/2")) == (409, "version_in_use")
    assert live.http.delete("/v1/adapters/x/aliases/prod").status_code == 204
    assert code_of(live.http.delete("/v1/adapters/x/aliases/prod")) == (404, "adapter_not_found")
    assert live.http.delete("/v1/adapters/x/versions/2").status_code == 204
    assert digest_of(live, "x@2") is digest_of(live, "x@prod") is None
    assert [v["version"] for v in live.http.get("/v1/adapters/x").json()["versions"]] == [1, 3]


def test_a_version_is_in_memory_before_it_is_current_again(settings, start, adapters_folder):
    live = start(settings.model_copy(update={"adapters": None, "adapter_root": adapters_folder}))
    digests = [live.load("x", source).json()["digest"] for source in ("mood", "topic", "rank2")]
    store = live.engine.adapters
    for number in (1, 2):
        store._residents.discard(store.get(f"x@{number}"))
    card = live.post("/v1/adapters/x/rollback", {"version": 2}).json()
    assert (card["digest"], card["resident"]) == (digests[1], True)
    for file in FILES:
        (live.registry.storage.path(digests[0]) / file).unlink()
    assert code_of(live.post("/v1/adapters/x/rollback", {})) == (409, "adapter_unavailable")
    assert digest_of(live, "x") == digests[1]


def test_a_pinned_version_keeps_its_weights_when_it_is_current_again(settings, start, adapters_folder):
    changes = {"adapters": None, "adapter_root": adapters_folder, "max_resident_adapters": 2}
    live = start(settings.model_copy(update=changes))
    live.load("x", "mood", pinned=True)
    live.load("x", "topic")
    card = live.post("/v1/adapters/x/rollback", {"version": 1}).json()
    assert (card["pinned"], card["resident"]) == (True, True)
    live.load("x", "topic")
    live.load("y", "mood", pinned=True)
    assert code_of(live.post("/v1/adapters/x/rollback", {"version": 1})) == (409, "too_many_adapters")
    assert live.http.get("/v1/adapters/x").json()["version"] == 2


def test_a_slow_source_holds_up_no_upload(settings, start, adapters_folder, monkeypatch):
    live = start(
        settings.model_copy(update={"adapters": None, "sources": ("hf://acme/",), "pool_threads": 1})
    )
    go = Event()
    monkeypatch.setattr(live.registry.remote, "fetch", lambda uri: go.wait(60))
    monkeypatch.setattr("server.registry.registry.FETCH_SECONDS", 0.2)
    slow = live.http.put("/v1/adapters/slow?wait=0", json={"source": "hf://acme/mood"})
    assert slow.status_code == 202
    assert upload_to(live, "x", adapters_folder / "mood").status_code == 201
    while (card := live.http.get("/v1/adapters/slow").json())["state"] != "failed":
        pass
    assert card["reason"] == "hf://acme/mood could not be fetched within 0.2 seconds"
    go.set()


@pytest.mark.parametrize("alias", ["7", "-x", "a%20b", "x" * 64])
def test_an_alias_is_no_number_and_safe(live, put, alias):
    put("x", "mood")
    assert live.http.put(f"/v1/adapters/x/aliases/{alias}", json={"version": 1}).status_code == 400


def test_a_name_with_a_version_stands_wherever_a_model_is_named(live, put):
    put("w", "writer")
    put("w", "poet")
    put("x", "mood")
    version = live.http.get("/v1/adapters/w").json()["versions"][0]["digest"]
    assert live.complete(model="w@1", prompt="w1", max_tokens=2).json()["adapter_digest"] == version
    chat = live.chat(model="w@1", messages=[{"role": "user", "content": "w1"}], max_tokens=2)
    assert chat.headers["x-adapter-digest"] == version
    assert live.http.get("/v1/models/w@1").json()["digest"] == version
    tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["w1"]}
    assert live.post("/v2/models/x@1/infer", {"inputs": [tensor]}).json()["model_name"] == "x@1"
    assert live.post("/tei/x@1/predict", {"inputs": "w1"}).status_code == 200
    assert code_of(live.complete(model="w@9", prompt="w1")) == (404, "model_not_found")


def test_files_are_uploaded(live, upload, adapters_folder, tmp_path):
    response = upload("x", adapters_folder / "mood", base="enc", pinned="true")
    assert response.status_code == 201
    card = response.json()
    assert (card["source"], card["pinned"], card["base"]) == ("upload", True, "enc")
    assert digest_of(live, "x") == card["digest"]
    assert card["digest"] == live.http.get("/v1/adapters/mood").json()["digest"]


@pytest.mark.parametrize(
    ("files", "data", "param"),
    [
        ({FILES[0]: b"{}"}, {}, FILES[1]),
        ({FILES[1]: b"x"}, {}, FILES[0]),
        ({FILES[0]: b"{}", FILES[1]: b"x"}, {"force": "true"}, "force"),
        ({FILES[0]: b"{}", "../../etc/passwd": b"x"}, {}, "../../etc/passwd"),
        ({FILES[0]: b"{}", FILES[1]: b"x"}, {"pinned": "yes"}, "pinned"),
        ({FILES[0]: b"{}", FILES[1]: b"x"}, {"base": "gpt9"}, "base"),
        ({FILES[0]: b"x" * 1_048_577, FILES[1]: b"x"}, {}, FILES[0]),
    ],
)
def test_a_bad_upload_is_refused_by_the_name_of_its_part(live, files, data, param):
    response = live.http.put("/v1/adapters/x?wait=60", files=files, data=data)
    assert response.status_code in (400, 413)
    assert response.json()["error"]["param"] == param
    assert live.http.get("/v1/adapters/x").status_code == 404


def test_an_upload_is_bounded_on_its_way(settings, start, adapters_folder):
    live = start(settings.model_copy(update={"max_adapter_bytes": 1024, "max_body_bytes": 1024}))
    files = {FILES[0]: b"{}", FILES[1]: b"x" * 3_000_000}
    assert code_of(live.http.put("/v1/adapters/x", files=files)) == (413, "request_too_large")
    chunks = (b"x" * 100_000 for _ in range(30))
    headers = {"content-type": "multipart/form-data; boundary=b"}
    answer = live.http.put("/v1/adapters/x", content=chunks, headers=headers)
    assert answer.status_code in (400, 413)
    files[FILES[1]] = b"x" * 2000
    assert code_of(live.http.put("/v1/adapters/x", files=files)) == (413, "request_too_large")
    assert list(live.registry.storage.folder.glob("sha256-*")) == []


def test_an_upload_that_is_no_form_is_refused_as_one(live):
    # Python has a charset of this name, which decodes nothing.
    headers = {"content-type": "multipart/form-data; boundary=b; charset=undefined"}
    body = b'--b\r\ncontent-disposition: form-data; name="base"\r\n\r\nenc\r\n--b--\r\n'
    response = live.http.put("/v1/adapters/x", content=body, headers=headers)
    assert code_of(response) == (400, "invalid_value")
    assert response.json()["error"]["message"] == "the body is not valid multipart/form-data"


def test_the_media_type_of_an_upload_may_be_in_any_case(settings, start, adapters_folder):
    live = start(settings.model_copy(update={"max_body_bytes": 1024}))
    files = {file: (adapters_folder / "mood" / file).read_bytes() for file in FILES}
    request = live.http.build_request("PUT", "/v1/adapters/x?wait=60", files=files)
    usual = request.headers["content-type"]
    request.headers["content-type"] = usual.replace("multipart/form-data;", "Multipart/FORM-data ;")
    assert live.http.send(request).status_code == 201


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"source": 3}', b"\xff"])
def test_a_body_that_is_neither_is_refused(live, body):
    response = live.http.put("/v1/adapters/x", content=body, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("wait", ["-1", "301", "nan", "inf", "soon"])
def test_the_wait_is_bounded(live, wait):
    response = live.http.put(f"/v1/adapters/x?wait={wait}", json={"source": "mood"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "wait")


def spoil(folder: Path, change: Callable[[dict], dict]) -> None:
    path = folder / FILES[1]
    save_file(change(load_file(path)), path)


def test_a_failed_load_leaves_what_serves_and_says_why(live, put, make_adapters, upload, tmp_path):
    digest = put("x", "topic").json()["digest"]
    folder = make_adapters(tmp_path) / "mood"
    spoil(folder, lambda tensors: {n: t for n, t in tensors.items() if n != "molex.mix"})
    assert code_of(upload("x", folder)) == (400, "invalid_adapter")
    card = live.http.get("/v1/adapters/x").json()
    assert (card["state"], card["version"], card["digest"]) == ("failed", 1, digest)
    assert "molex.mix" in card["reason"]
    assert digest_of(live, "x") == digest
    assert digest_of(live, "x@2") is None
    stored = {path.name.replace("-", ":") for path in live.registry.storage.folder.glob("sha256-*")}
    assert stored == {digest}


def test_weights_that_overflow_fail_their_warm_up_alone(live, put, make_adapters, upload, tmp_path):
    digest = put("x", "mood").json()["digest"]
    folder = make_adapters(tmp_path) / "mood"
    # Every value is finite; their products are not, in float64 either.
    spoil(folder, lambda tensors: {n: t.double() * 1e200 if "lora" in n else t for n, t in tensors.items()})
    answer = upload("x", folder)
    assert code_of(answer) == (400, "invalid_adapter")
    assert "warm-up" in answer.json()["error"]["message"]
    assert live.http.get("/v1/adapters/x").json()["reason"] == answer.json()["error"]["message"]
    assert digest_of(live, "x") == digest


def test_a_warm_up_that_fails_changes_no_answer_of_its_step(
    live, brake, make_adapters, upload, tmp_path, monkeypatch
):
    monkeypatch.setattr("server.scheduler.BaseQueue._gives_way", lambda queue: False)
    request = {"model": "mood", "input": "w3 w1"}
    expected = live.classify(**request).json()["data"][0]["probs"]
    folder = make_adapters(tmp_path) / "mood"
    spoil(folder, lambda tensors: {n: t.double() * 1e200 if "lora" in n else t for n, t in tensors.items()})
    held = brake(live, "enc")
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(live.classify, **request)
        held.until(lambda: len(held.batches) == 1)
        beside = pool.submit(live.classify, **request)
        loading = pool.submit(upload, "x", folder)
        held.until(lambda: waiting(live, "enc") == 2)
        held.release()
    assert code_of(loading.result()) == (400, "invalid_adapter")
    first_alone, both, *warm_up_alone = held.batches
    assert (len(first_alone), len(both)) == (1, 2)
    assert all(len(batch) == 1 for batch in warm_up_alone)
    for answer in (first.result(), beside.result()):
        assert answer.json()["data"][0]["probs"] == pytest.approx(expected, abs=1e-12)


def test_the_old_version_serves_until_the_new_one_has_passed(live, put, monkeypatch):
    old = put("x", "mood").json()["digest"]
    go, reached = Event(), Event()
    encode = live.engine.bases["enc"].tokenization.encode

    def held(texts, *arguments, **options):
        if texts == [warm_up.TEXT]:
            reached.set()
            assert go.wait(60)
        return encode(texts, *arguments, **options)

    monkeypatch.setattr(live.engine.bases["enc"].tokenization, "encode", held)
    assert put("x", "topic", wait=0).status_code == 202
    assert reached.wait(60)
    assert digest_of(live, "x") == old
    go.set()
    new = put("x", "topic").json()["digest"]
    assert digest_of(live, "x") == new != old


def test_what_is_removed_finishes_what_it_began(live, put, brake):
    put("x", "mood")
    braked = brake(live, "enc")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(digest_of, live, "x")
        braked.until(lambda: len(live.engine._adapters_in_use(["enc"])) == 1)
        assert live.http.delete("/v1/adapters/x").status_code == 204
        assert live.http.get("/v1/adapters/x").status_code == 404
        assert list(live.registry.storage.folder.glob("sha256-*")) == []
        braked.release()
        assert running.result() is not None
    assert digest_of(live, "x") is None


def test_a_load_under_way_ends_with_its_adapter(live, put, monkeypatch):
    go = Event()
    sources = live.engine.adapters.sources
    fit = sources.fit
    monkeypatch.setattr(sources, "fit", lambda *arguments: go.wait(60) and fit(*arguments))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(put, "x", "mood")
        while not live.http.get("/v1/adapters/x").is_success:
            pass
        assert live.http.delete("/v1/adapters/x").status_code == 204
        assert code_of(waiting.result()) == (404, "adapter_not_found")
        go.set()
    assert put("x", "mood").json()["version"] == 1


def test_a_folder_of_the_operator_is_version_0_until_it_is_replaced(
    live, put, make_adapters, settings, start, tmp_path
):
    own = start(settings.model_copy(update={"adapters": make_adapters(tmp_path / "a")}))
    card = own.http.get("/v1/adapters/mood").json()
    assert (card["version"], [v["version"] for v in card["versions"]]) == (0, [0])
    assert digest_of(own, "mood@0") == card["digest"]
    loaded = own.http.put("/v1/adapters/mood?wait=60", json={"source": "topic"})
    assert (loaded.status_code, loaded.json()["version"]) == (200, 1)
    assert digest_of(own, "mood") == loaded.json()["digest"]
    assert digest_of(own, "mood@0") is None


def test_the_number_of_versions_is_limited(settings, start, adapters_folder):
    live = start(settings.model_copy(update={"max_adapters": 8}))

    def put(name: str, source: str) -> httpx.Response:
        return live.http.put(f"/v1/adapters/{name}?wait=60", json={"source": source})

    assert [put("x", source).status_code for source in ("mood", "topic")] == [201, 200]
    assert code_of(put("x", "rank2")) == (409, "too_many_adapters")
    assert code_of(put("y", "mood")) == (409, "too_many_adapters")
    assert put("x", "mood").status_code == 200


def test_an_upload_that_is_refused_leaves_no_files(settings, start, adapters_folder):
    live = start(settings.model_copy(update={"max_adapters": 6}))
    files = {file: (adapters_folder / "mood" / file).read_bytes() for file in FILES}
    assert code_of(live.http.put("/v1/adapters/x", files=files)) == (409, "too_many_adapters")
    assert list(live.registry.storage.folder.glob("sha256-*")) == []
