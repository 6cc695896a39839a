"""The numbers of /metrics equal what was sent."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future

import httpx
import pytest
import torch

from server.adapters import AdapterStore
from server.engine import Engine
from server.metrics import Metrics
from tests.server.looks import waiting


@pytest.fixture
def live(settings, start):
    return start(settings)


def changes(live, work) -> dict[str, float]:
    """What `work` adds to each sample."""
    before = live.metrics()
    work()
    after = live.metrics()
    return {name: value - before.get(name, 0) for name, value in after.items()}


def changed(change: dict[str, float], metric: str) -> dict[str, float]:
    return {name: value for name, value in change.items() if name.startswith(metric) and value}


def test_requests_are_counted_by_template_and_status(live):
    def work():
        for text in ("w1", "w2", "w3"):
            live.classify(model="mood", input=text)
        live.classify(model="nobody", input="w1")
        live.http.get("/v1/adapters/mood")
        live.http.get("/v1/adapters/topic")
        live.http.get("/no/such/path")
        live.http.get("/v1/classify")

    change = changes(live, work)
    assert changed(change, "molex_requests_total") == {
        'molex_requests_total{route="/v1/classify",status="200"}': 3,
        'molex_requests_total{route="/v1/classify",status="404"}': 1,
        'molex_requests_total{route="/v1/adapters/{name}",status="200"}': 2,
        'molex_requests_total{route="unmatched",status="404"}': 1,
        'molex_requests_total{route="/v1/classify",status="405"}': 1,
        'molex_requests_total{route="/metrics",status="200"}': 1,
    }
    for stage, count in {"total": 5, "queue": 3, "tokenize": 3, "forward": 3}.items():
        name = f'molex_request_seconds_count{{route="/v1/classify",stage="{stage}"}}'
        assert change[name] == count


def test_what_the_clients_counted_is_what_the_server_counted(live, threads, brake):
    """Every way for a classification to end, many at a time."""
    good = {"model": "mood", "input": "w1"}
    sent: Counter[int] = Counter()

    def send_all(*requests: tuple[dict, dict]) -> list[Future[httpx.Response]]:
        return [
            threads.submit(live.http.post, "/v1/classify", json=body, headers=headers)
            for body, headers in requests
        ]

    def count(futures: list[Future[httpx.Response]]) -> None:
        sent.update(future.result().status_code for future in futures)

    count(send_all(*[(good, {})] * 20, *[(good | {"model": "nobody"}, {})] * 5))
    count(send_all(*[(good | {"colour": "red"}, {})] * 4, *[(good | {"model": "dec"}, {})] * 3))
    count(send_all((good | {"input": "w1 " * 3_000_000}, {})))
    held = brake(live, "enc")
    going = send_all((good, {}))
    held.until(lambda: len(held.batches) == 1)
    count(send_all(*[(good, {"x-request-timeout": "1"})] * 6))
    for number in range(7, 10):
        with live.send("/v1/classify", good):
            held.until(lambda n=number: waiting(live, "enc") == n)
        sent[499] += 1
    # What has gone keeps its place until the step ends that is under way.
    going += send_all(*((good | {"input": ["w1"] * size}, {}) for size in (32, 64 - 32 - 9)))
    held.until(lambda: waiting(live, "enc") == 64)
    count(send_all(*[(good, {})] * 10))
    held.release()
    count(going)
    assert {*sent} == {200, 400, 404, 413, 429, 499, 504}

    def counted() -> dict[int, float]:
        samples = live.metrics()
        name = 'molex_requests_total{{route="/v1/classify",status="{}"}}'
        return {status: samples.get(name.format(status), 0) for status in sent}

    held.until(lambda: sum(counted().values()) == sent.total())
    assert counted() == sent
    ended = live.metrics()
    assert ended['molex_request_seconds_count{route="/v1/classify",stage="total"}'] == sent.total()
    assert ended['molex_request_seconds_count{route="/v1/classify",stage="forward"}'] == sent[200]


def test_names_that_callers_make_up_add_no_series(live):
    def ask(number: int) -> None:
        name = f"x{number}"
        live.classify(model=name, input="w1")
        live.post(f"/tei/{name}/predict", {"inputs": "w1"})
        live.post(f"/v2/models/{name}/infer", {"inputs": []})
        live.http.get(f"/v1/adapters/{name}?wait={name}", headers={name: name})
        live.http.get(f"/{name}/{name}")
        live.http.request(f"X{number}", "/v1/classify")
        assert [live.load(name, source).status_code for source in (name, "topic")] == [400, 201]
        assert live.load(name, "topic", base=name).status_code == 400
        assert live.classify(model=name, input="w1").status_code == 200
        assert live.unload(name).status_code == 204

    live.metrics()
    ask(0)
    before = live.metrics()
    for number in range(1, 6):
        ask(number)
    assert live.metrics().keys() == before.keys()


def test_a_classification_is_counted_in_tokens_adapters_and_routes(live):
    answers = []
    change = changes(
        live,
        lambda: answers.append(live.classify(model="mood", input=["w1 w2", "w3"], return_routes=True)),
    )
    assert change['molex_batch_tokens_sum{base="enc"}'] == 3 + 2
    assert change['molex_batch_distinct_adapters_sum{base="enc"}'] == 1
    assert change['molex_batch_tokens_count{base="enc"}'] == 1
    routed = changed(change, "molex_route_total")
    expected: dict[str, float] = {}
    for entry in answers[0].json()["data"]:
        for depth, layer in zip((0, 2, 4), entry["routes"], strict=True):
            name = f'molex_route_total{{base="enc",depth="{depth}",layer="{layer}"}}'
            expected[name] = expected.get(name, 0) + 1
    assert routed == expected


@pytest.mark.parametrize("stream", [False, True])
def test_a_generation_is_counted_in_tokens(live, stream):
    change = changes(
        live,
        lambda: live.complete(
            model="writer", prompt="w1 w2", max_tokens=7, ignore_eos=True, temperature=0, stream=stream
        ),
    )
    assert change['molex_time_to_first_token_seconds_count{base="dec"}'] == 1
    assert change['molex_inter_token_seconds_count{base="dec"}'] == 6
    assert change['molex_batch_tokens_sum{base="dec"}'] == 3 + 6
    assert change['molex_request_seconds_count{route="/v1/completions",stage="forward"}'] == 1
    # A route is chosen once, at the prompt.
    assert sum(value for name, value in change.items() if name.startswith("molex_route_total")) == 3


def test_loads_are_counted_by_result(live):
    def work():
        live.http.put("/v1/adapters/x?wait=60", json={"source": "topic"})
        live.http.put("/v1/adapters/x?wait=60", json={"source": "topic", "base": "dec"})
        live.http.delete("/v1/adapters/x")
        live.http.put("/v1/adapters/y?wait=60", json={"source": "mood"})

    change = changes(live, work)
    assert change['molex_adapter_loads_total{base="enc",result="loaded"}'] == 2
    assert change['molex_adapter_loads_total{base="dec",result="refused"}'] == 1
    assert change['molex_resident_adapters{base="enc"}'] == 1


def test_memory_is_counted_by_kind(live):
    sizes = {}

    def work():
        live.http.put("/v1/adapters/x?wait=60", json={"source": "topic"})
        sizes["x"] = live.http.get("/v1/adapters/x").json()["bytes"]

    change = changes(live, work)
    assert change['molex_memory_bytes{base="enc",kind="adapters"}'] == sizes["x"]
    assert live.complete(model="writer", prompt="w1", max_tokens=20).status_code == 200
    values = live.metrics()
    assert values['molex_memory_bytes{base="enc",kind="kv_cache"}'] == 0
    page = 5 * 16 * 2 * 2 * 8 * 8  # Layers, tokens, keys and values, heads, numbers in each, bytes.
    assert values['molex_memory_bytes{base="dec",kind="kv_cache"}'] >= 4 * page
    assert values['molex_memory_bytes{base="dec",kind="weights"}'] > 0
    assert values["molex_peak_resident_memory_bytes"] > sum(
        values[f'molex_memory_bytes{{base="{base}",kind="weights"}}'] for base in ("enc", "dec")
    )


def test_the_memory_of_a_gpu_is_that_of_the_device_that_was_asked_for(settings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_allocated", {"cuda:1": 5}.__getitem__)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", {"cuda:1": 8}.__getitem__)
    on_gpu, metrics = settings.model_copy(update={"device": "cuda:1"}), Metrics()
    Engine(on_gpu, {}, AdapterStore({}, on_gpu, metrics), metrics)
    lines = metrics.render().decode().splitlines()
    assert 'molex_gpu_memory_bytes{kind="allocated"} 5.0' in lines
    assert 'molex_gpu_memory_bytes{kind="peak"} 8.0' in lines


def test_names_are_those_that_dashboards_use(live):
    live.complete(model="writer", prompt="w1")
    text = live.http.get("/metrics").text
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE molex")}
    assert names == {
        "molex_requests_total",
        "molex_reused_tokens_total",
        "molex_request_seconds",
        "molex_time_to_first_token_seconds",
        "molex_inter_token_seconds",
        "molex_queue_depth",
        "molex_running_sequences",
        "molex_batch_tokens",
        "molex_batch_distinct_adapters",
        "molex_batch_distinct_layers",
        "molex_adapter_loads_total",
        "molex_cold_load_seconds",
        "molex_adapter_evictions_total",
        "molex_registered_adapters",
        "molex_resident_adapters",
        "molex_kv_cache_pages",
        "molex_memory_bytes",
        "molex_peak_resident_memory_bytes",
        "molex_route_total",
    }
