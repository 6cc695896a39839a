"""What happens between requests: one batch, failures, cancellation, overload, reloads."""

from __future__ import annotations

import asyncio
import json
import random
from concurrent.futures import Future
from threading import current_thread

import httpx
import pytest

from molex import MolexModel, write_adapter
from molex.decoding import Decoding
from molex.forward import Forward
from tests.molex.native.kernels import needs_kernels
from tests.server.looks import LONG, all_free, idle, running, waiting
from tests.tiny import random_adapter

PAGE_STATES = ("used", "kept", "free")


def test_adapters_of_all_kinds_share_a_batch_and_answer_as_alone(live, threads, brake):
    texts = ["w1 w2 w3", "w9", "w8 w7 w6 w5 w4", "w20 w30"]
    classifications = [
        ("/v1/classify", {"model": model, "input": text, "return_routes": True})
        for model in ("mood", "topic", "rank2", "judge")
        for text in texts
    ]
    generations = [
        ("/v1/completions", {"model": model, "prompt": text, "return_routes": True, **how})
        for model, text in zip(("writer", "poet", "dec", "writer"), texts, strict=True)
        for how in ({"temperature": 0, "max_tokens": 12}, {"seed": 3, "max_tokens": 9})
    ]
    requests = classifications + generations

    def ask(request):
        answer = live.http.post(request[0], json=request[1]).json()
        return answer.get("data") or answer["choices"]

    alone = [ask(request) for request in requests]
    brakes = [brake(live, "enc"), brake(live, "dec")]
    together = threads.map(ask, requests)
    brakes[0].until(lambda: waiting(live, "enc") + waiting(live, "dec") > 10)
    for item in brakes:
        item.release()
    for one, other in zip(alone, together, strict=True):
        for left, right in zip(one, other, strict=True):
            assert left.pop("probs", []) == pytest.approx(right.pop("probs", []), abs=1e-6)
            assert left == right
    mixed = max(len({s.adapter for s in batch}) for item in brakes for batch in item.batches)
    assert mixed >= 3


def test_a_failed_batch_answers_every_member_and_the_worker_goes_on(live, threads, brake):
    held = brake(live, "enc")
    first = threads.submit(live.classify, model="mood", input="w1")
    held.until(lambda: len(held.batches) == 1)
    others = [threads.submit(live.classify, model=name, input="w2") for name in ("mood", "topic")]
    held.until(lambda: waiting(live, "enc") == 2)
    held.failing = True
    held.release()
    assert first.result().status_code == 500
    assert [other.result().status_code for other in others] == [200, 200]


@needs_kernels
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_every_token_but_the_first_takes_one_call_into_the_kernels(settings, start, monkeypatch, precision):
    live = start(settings.model_copy(update={"precision": precision}))
    step, steps = Decoding.step, []

    def counted(self, rows):
        steps.append(len(rows))
        return step(self, rows)

    monkeypatch.setattr(Decoding, "step", counted)
    for model in ("writer", "poet", "dec"):
        steps.clear()
        assert live.complete(model=model, prompt="w1 w2", max_tokens=5, ignore_eos=True).status_code == 200
        assert steps == [1] * 4


def poison(monkeypatch, token_id: int) -> list[int]:
    """Every pass with this token breaks at depth 3, when keys and values have been written at those before.

    Returns the numbers of rows of the broken passes.
    """
    run_depth, broken = Forward.run_depth, []

    def run(self, depth, *args):
        if depth == 3 and any(token_id in row.token_ids for row in self.rows):
            broken.append(len(self.rows))
            raise RuntimeError("secret/path broke")
        return run_depth(self, depth, *args)

    monkeypatch.setattr(Forward, "run_depth", run)
    return broken


def test_a_poisoned_request_fails_alone_and_changes_no_other_answer(live, threads, brake, monkeypatch):
    generations = [
        {"model": model, "prompt": f"w{number} w2", "seed": 5, "max_tokens": 12, "return_routes": True}
        for number, model in enumerate(["writer", "poet", "dec"])
    ]
    texts = ["w8 w7", "w6", "w5 w5 w5"]
    alone = [live.complete(**body).json()["choices"] for body in generations]
    scores = [live.classify(model="judge", input=text).json()["data"][0]["probs"] for text in texts]
    broken = poison(monkeypatch, 81)  # The token of w77.
    held = brake(live, "dec")
    asked = [threads.submit(live.complete, **body) for body in generations]
    held.until(lambda: running(live) + waiting(live, "dec") == 3)
    bad = threads.submit(live.classify, model="judge", input="w1 w77")
    beside = [threads.submit(live.classify, model="judge", input=text) for text in texts]
    held.until(lambda: running(live) + waiting(live, "dec") == 7)
    held.release()
    assert bad.result().json()["error"]["code"] == "internal_error"
    assert "secret" not in bad.result().text
    assert [future.result().json()["choices"] for future in asked] == alone
    for future, probs in zip(beside, scores, strict=True):
        assert future.result().json()["data"][0]["probs"] == pytest.approx(probs, abs=1e-12)
    assert broken[0] > broken[-1] == 1
    assert all_free(live)


def test_a_poisoned_generation_beside_decoding_ones_fails_alone(live, threads, brake, monkeypatch):
    bodies = [{"model": model, "prompt": "w1 w2", **LONG} for model in ("writer", "poet")]
    alone = [live.complete(**body).json()["choices"] for body in bodies]
    held = brake(live, "dec")
    asked = [threads.submit(live.complete, **body) for body in bodies]
    held.until(lambda: running(live) + waiting(live, "dec") == 2)
    broken = poison(monkeypatch, 81)
    arrived = []

    def run(sequences, part_tokens):
        if not arrived and len(sequences) == 2:
            arrived.append(threads.submit(live.complete, model="dec", prompt=[1, 81], max_tokens=5))
            held.until(lambda: waiting(live, "dec") == 1)
        return original(sequences, part_tokens)

    original, held._run = held._run, run
    held.release()
    assert [future.result().json()["choices"] for future in asked] == alone
    assert arrived[0].result().status_code == 500
    assert broken == [3, 2, 1]
    assert all_free(live)


def test_a_poisoned_adapter_fails_alone_however_many_requests_it_has(live, threads, brake, monkeypatch):
    run_depth, digest = Forward.run_depth, live.http.get("/v1/adapters/topic").json()["digest"]

    def run(self, *args):
        if any(row.adapter.digest == digest for row in self.rows):
            raise RuntimeError("a test breaks this adapter")
        return run_depth(self, *args)

    monkeypatch.setattr(Forward, "run_depth", run)
    monkeypatch.setattr("server.runner.MAX_SPLITS", 3)
    held = brake(live, "enc")
    first = threads.submit(live.classify, model="mood", input="w1")
    held.until(lambda: len(held.batches) == 1)
    asked = []
    for number in range(18):
        name = ("topic", "mood", "topic", "rank2", "topic", "topic")[number % 6]
        asked.append((name, threads.submit(live.classify, model=name, input=f"w{number}")))
        held.until(lambda n=number: waiting(live, "enc") == n + 1)
    held.release()
    assert first.result().status_code == 200
    for name, answer in asked:
        assert answer.result().status_code == (500 if name == "topic" else 200)
    assert len(held.batches) == 2


def test_when_everything_fails_retries_end(live, threads, brake, monkeypatch):
    runner = live.engine.bases["enc"].runner
    passes = []

    def begin(rows, *_):
        passes.append(len(rows))
        raise MemoryError

    monkeypatch.setattr(runner._model, "begin", begin)
    monkeypatch.setattr("server.runner.MAX_SPLITS", 5)
    answer = live.classify(model="mood", input=["w1"] * 20)
    assert answer.status_code == 500
    assert sum(passes) > 20
    assert len(passes) == 2 * 5 + 1


def test_all_members_of_a_failed_batch_are_told(live, threads, brake):
    held = brake(live, "dec")
    first = threads.submit(live.classify, model="judge", input="w1")
    held.until(lambda: len(held.batches) == 1)
    others = [
        threads.submit(live.complete, model="writer", prompt="w2", max_tokens=4),
        threads.submit(live.complete, model="poet", prompt="w2", max_tokens=4, stream=True),
        threads.submit(live.classify, model="judge", input="w3"),
    ]
    held.until(lambda: waiting(live, "dec") == 3)
    original, failures = held._run, []

    def run(sequences, part_tokens):
        if len(sequences) == 3 and not failures:
            failures.append(sequences)
            raise RuntimeError("secret/path broke")
        return original(sequences, part_tokens)

    held._run = run
    held.release()
    assert first.result().status_code == 200
    for other in others:
        answer = other.result()
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal_error"
        assert "secret" not in answer.text
    assert all_free(live)
    assert live.complete(model="writer", prompt="w2", max_tokens=4).status_code == 200


def test_a_failure_in_the_middle_of_a_stream_is_an_event(live, monkeypatch):
    runner = live.engine.bases["dec"].runner
    original = runner.run

    def run(sequences, part_tokens):
        if any(len(sequence.output_ids) == 3 for sequence in sequences):
            raise RuntimeError("a test breaks this step")
        return original(sequences, part_tokens)

    monkeypatch.setattr(runner, "run", run)
    answer = live.complete(model="writer", prompt="w1", stream=True, **LONG)
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "internal_error"
    assert all_free(live)


def test_a_sequence_with_broken_numbers_fails_alone(live, monkeypatch, threads, brake):
    held = brake(live, "enc")
    block = threads.submit(live.classify, model="mood", input="w1")
    held.until(lambda: len(held.batches) == 1)
    bad = threads.submit(live.classify, model="topic", input="w9 w9 w9 w9")
    good = threads.submit(live.classify, model="topic", input="w2")
    held.until(lambda: waiting(live, "enc") == 2)
    runner = live.engine.bases["enc"].runner
    advance = runner._advance

    def poisoned(sequence, logits):
        return advance(sequence, logits * float("nan") if len(sequence.token_ids) == 5 else logits)

    monkeypatch.setattr(runner, "_advance", poisoned)
    held.release()
    assert [block.result().status_code, bad.result().status_code, good.result().status_code] == [
        200,
        500,
        200,
    ]


def test_a_full_queue_is_429_with_retry_after(live, threads, brake):
    held = brake(live, "enc")
    first = threads.submit(live.classify, model="mood", input="w1")
    held.until(lambda: len(held.batches) == 1)
    full = [threads.submit(live.classify, model="mood", input=["w1"] * 32) for _ in range(2)]
    held.until(lambda: waiting(live, "enc") == 64)
    refused = live.classify(model="mood", input="w1")
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "queue_full"
    other_base = threads.submit(live.classify, model="judge", input="w1")
    held.release()
    answers = [future.result().status_code for future in [first, *full, other_base]]
    assert answers == [200, 200, 200, 200]


def test_what_is_urgent_runs_before_what_came_earlier(live, threads, brake):
    held = brake(live, "enc")
    first = threads.submit(live.classify, model="mood", input="w1")
    held.until(lambda: len(held.batches) == 1)
    asked = []
    # Of these texts one fits into a step.
    for number, priority in enumerate((3, 0, -2, 0)):
        body = {"model": "mood", "input": "w1 " * 40, "priority": priority}
        asked.append(threads.submit(live.classify, **body))
        held.until(lambda n=number: waiting(live, "enc") == n + 1)
    held.release()
    assert {future.result().status_code for future in (first, *asked)} == {200}
    assert [sequence.priority for [sequence] in held.batches[1:]] == [-2, 0, 0, 3]


def test_what_is_in_no_hurry_waits_until_the_worker_is_idle_but_not_for_ever(live, threads, brake):
    held = brake(live, "enc")
    answer = threads.submit(live.classify, model="mood", input="w1")
    held.until(lambda: len(held.batches) == 1)

    def waiting_for_idle(at_most: float) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(live.engine.idle(at_most), live.engine._loop)

    waiting_for_idle(0).result(60)
    patient = waiting_for_idle(60)
    assert live.http.get("/livez").status_code == 200
    assert not patient.done()
    held.release()
    patient.result(60)
    assert answer.result(60)


def test_leaving_a_stream_frees_its_pages_within_a_step(live, brake):
    held = brake(live, "dec")
    connection = live.send("/v1/completions", {"model": "writer", "prompt": "w1 w2", "stream": True, **LONG})
    original = held._run

    def run(sequences, part_tokens):
        if sequences[0].output_ids and not sequences[0].cancelled:
            # The first token is on its way: the client goes once it has some of it.
            connection.recv(1)
            connection.close()
            held.until(lambda: sequences[0].cancelled)
        return original(sequences, part_tokens)

    held._run = run
    held.release()
    held.until(lambda: len(held.batches) == 2)
    held.until(lambda: idle(live))
    [sequence] = held.batches[0]
    assert len(sequence.output_ids) == len(held.batches) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_before_the_first_token_drops_the_work(live, brake, stream):
    held = brake(live, "dec")
    with live.send("/v1/completions", {"model": "writer", "prompt": "w1 w2", "stream": stream, **LONG}):
        held.until(lambda: len(held.batches) == 1)
    [sequence] = held.batches[0]
    held.until(lambda: sequence.cancelled)
    held.release()
    held.until(lambda: idle(live))
    assert len(held.batches) == 1
    assert len(sequence.output_ids) <= 1
    assert live.metrics()['molex_requests_total{route="/v1/completions",status="499"}'] >= 1


def test_nothing_is_left_after_a_crowd_of_which_some_leave(live, threads, brake):
    def ask(number: int) -> bool:
        chance = random.Random(number)
        if number % 3 == 0:
            model = chance.choice(["mood", "topic", "rank2", "judge"])
            texts = ["w1 " * chance.randint(1, 60) for _ in range(chance.randint(1, 4))]
            return live.classify(model=model, input=texts).status_code == 200
        model = chance.choice(["writer", "poet", "dec"])
        body = {"model": model, "prompt": "w1 " * chance.randint(1, 30), "max_tokens": chance.randint(1, 30)}
        with httpx.stream(
            "POST", f"{live.url}/v1/completions", json=body | {"stream": True}, timeout=60
        ) as s:
            lines = iter(list(s.iter_lines())) if number % 3 == 1 else s.iter_lines()
            first = next(lines)
            # Every third request leaves here, after its first token.
            return s.status_code == 200 and first.startswith("data: {")

    assert all(threads.map(ask, range(90)))
    brake(live, "dec").until(lambda: idle(live))


def test_more_generations_than_slots_all_finish(live):
    prompts = [f"w{i}" for i in range(10)]
    answer = live.complete(model="poet", prompt=prompts, temperature=0, max_tokens=5).json()
    for index, prompt in enumerate(prompts):
        alone = live.complete(model="poet", prompt=prompt, temperature=0, max_tokens=5).json()
        assert answer["choices"][index] == alone["choices"][0] | {"index": index}


def test_generations_whose_tokens_do_not_fit_together_take_turns(settings, start, threads, brake):
    # 96 tokens are 6 pages: one generation of `writer`, with its routed stream, of 3 + 40 tokens at a time.
    live = start(settings.model_copy(update={"max_cache_tokens": 96}))
    held = brake(live, "dec")
    body = {"model": "writer", "prompt": "w1 w2", "max_tokens": 40, "ignore_eos": True}
    asked = [threads.submit(live.complete, **body) for _ in range(3)]
    held.until(lambda: waiting(live, "dec") == 2)
    assert running(live) == 1
    held.release()
    assert [answer.result().json()["usage"]["completion_tokens"] for answer in asked] == [40] * 3
    assert {len(batch) for batch in held.batches} == {1}
    assert all_free(live)
    refused = live.complete(**body | {"max_tokens": 60})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert "need 8 pages of the key-value cache; it has 6" in refused.json()["error"]["message"]
    bare = live.complete(**body | {"model": "dec", "max_tokens": 60})
    assert bare.status_code == 200


def words(*numbers: int) -> str:
    return " ".join(f"w{n}" for n in numbers)


def reused(answer) -> int:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize(("model", "again", "longer"), [("writer", 32, 0), ("poet", 32, 32), ("dec", 32, 32)])
def test_equal_beginnings_are_run_once_where_that_is_exact(settings, start, model, again, longer):
    live = start(settings)
    plain = start(settings.model_copy(update={"prefix_reuse": "off"}))
    prompts = [words(*range(40)), words(*range(40)), words(*range(40), 7, 8), words(9, *range(1, 40))]
    found = []
    for prompt in prompts:
        body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 9, "return_routes": True}
        answer, expected = (server.complete(**body).json() for server in (live, plain))
        assert answer["choices"] == expected["choices"]
        assert reused(expected) == 0
        found.append(reused(answer))
    assert found == [0, again, longer, 0]
    assert live.metrics()['molex_reused_tokens_total{base="dec"}'] == sum(found)
    assert plain.metrics()['molex_reused_tokens_total{base="dec"}'] == 0


def test_the_next_turn_of_a_conversation_finds_the_last_one(settings, start):
    live = start(settings)
    prompt = [1, *range(5, 25)]
    body = {"model": "poet", "temperature": 0, "max_tokens": 20, "ignore_eos": True, "logprobs": 0}
    first = live.complete(prompt=prompt, **body).json()
    said = [int(token.strip()[1:]) + 4 for token in first["choices"][0]["logprobs"]["tokens"]]
    second = live.complete(prompt=[*prompt, *said, 30, 31], **body).json()
    # 21 + 20 tokens, of which the last was never run.
    assert reused(second) == 32


def test_answers_stay_right_while_kept_pages_are_given_away(settings, start, threads):
    live = start(settings.model_copy(update={"max_cache_tokens": 256}))
    plain = start(settings.model_copy(update={"prefix_reuse": "off"}))
    chance = random.Random(0)
    bodies = []
    for _ in range(40):
        first = chance.choice([0, 40])
        beginning = range(first, first + chance.choice([17, 33]))
        end = [chance.randint(0, 90) for _ in range(chance.randint(0, 4))]
        model = chance.choice(["writer", "poet", "dec"])
        bodies.append({"model": model, "prompt": words(*beginning, *end), "temperature": 0, "max_tokens": 6})
    answers, expected = (
        [answer.json() for answer in threads.map(lambda body, s=server: s.complete(**body), bodies)]
        for server in (live, plain)
    )
    assert [answer["choices"] for answer in answers] == [answer["choices"] for answer in expected]
    assert sum(map(reused, answers)) > 0
    values = live.metrics()
    pages = {state: values[f'molex_kv_cache_pages{{base="dec",state="{state}"}}'] for state in PAGE_STATES}
    assert sum(pages.values()) == 256 / 16
    assert pages["used"] == 0
    assert pages["kept"] > 0


def test_a_prompt_longer_than_the_token_budget_runs(live):
    text = " ".join(["w1"] * 80)
    assert live.classify(model="mood", input=text).status_code == 200
    assert live.complete(model="writer", prompt=text, max_tokens=4).status_code == 200


@pytest.mark.parametrize("budget", [4, 9, 30])
def test_an_answer_does_not_depend_on_how_its_prompt_was_cut(live, settings, start, budget):
    cut = start(settings.model_copy(update={"max_batch_tokens": budget}))
    text = " ".join(f"w{i}" for i in range(40))
    for model in ("writer", "poet", "dec"):
        body = {"model": model, "prompt": text, "max_tokens": 8, "temperature": 0, "return_routes": True}
        whole, parts = (server.complete(**body).json()["choices"][0] for server in (live, cut))
        assert whole == parts
    for model in ("mood", "rank2", "topic", "judge"):
        whole, parts = (server.classify(model=model, input=text).json()["data"][0] for server in (live, cut))
        assert whole["probs"] == pytest.approx(parts["probs"], abs=1e-12)


def test_a_long_prompt_runs_beside_decoding_and_can_be_left(settings, start, threads, brake):
    live = start(settings.model_copy(update={"max_batch_tokens": 20}))
    held = brake(live, "dec")
    decoding = threads.submit(live.complete, model="poet", prompt="w1", **LONG)
    held.until(lambda: len(held.batches) == 1)
    body = {"model": "writer", "prompt": " ".join(["w1"] * 80), "max_tokens": 2}
    connection = live.send("/v1/completions", body)
    held.until(lambda: waiting(live, "dec") == 1)
    parts = []
    original = held._run

    def run(sequences, part_tokens):
        output = original(sequences, part_tokens)
        if part_tokens:
            parts.append((part_tokens, len(output.updates), sequences[-1].is_paused))
        if part_tokens and len(parts) == 2:
            connection.close()
            held.until(lambda: sequences[-1].cancelled)
        return output

    held._run = run
    held.release()
    assert decoding.result().json()["usage"]["completion_tokens"] == LONG["max_tokens"]
    # 81 tokens in 19 beside one that decodes: one of the five depths a step, until the client left.
    assert parts == [(19, 1, True), (19, 1, True)]
    held.until(lambda: idle(live))


def test_a_long_prompt_that_fails_fails_alone(settings, start, threads, brake, monkeypatch):
    live = start(settings.model_copy(update={"max_batch_tokens": 20}))
    held = brake(live, "dec")
    decoding = threads.submit(live.complete, model="poet", prompt="w1", **LONG)
    held.until(lambda: len(held.batches) == 1)
    long = threads.submit(live.complete, model="writer", prompt=" ".join(["w1"] * 80), max_tokens=2)
    held.until(lambda: waiting(live, "dec") == 1)

    def begin(*_):
        raise RuntimeError("a test breaks this prompt")

    model = live.engine.bases["dec"].model
    original = model.begin
    monkeypatch.setattr(model, "begin", lambda *a: begin() if len(a[0][0].token_ids) > 20 else original(*a))
    held.release()
    assert long.result().status_code == 500
    assert decoding.result().status_code == 200
    assert all_free(live)


def test_a_reload_under_traffic_leaves_running_requests_on_their_weights(
    start, settings, threads, brake, models, tmp_path
):
    live = start(settings.model_copy(update={"adapter_root": tmp_path}))
    body = {"model": "shifting", "prompt": "w1 w2 w3", "temperature": 0, "max_tokens": 30}
    for seed in (70, 71):
        adapter = random_adapter(models["dec"].spec, seed=seed, task="CAUSAL_LM", r=2)
        write_adapter(adapter, tmp_path / f"shifting-{seed}")

    def put(seed: int) -> str:
        answer = live.http.put("/v1/adapters/shifting?wait=60", json={"source": f"shifting-{seed}"})
        return answer.json()["digest"]

    old = put(70)
    expected = live.complete(**body).json()["choices"][0]["text"]
    held = brake(live, "dec")
    before = threads.submit(live.complete, **body, stream=True)
    held.until(lambda: len(held.batches) == 1)
    loading = threads.submit(put, 71)
    # Its warm-up begins in the step after the next one.
    held.until(lambda: waiting(live, "dec") == 1)
    held.release()
    new = loading.result()
    events = [line.removeprefix("data: ") for line in before.result().text.split("\n\n")[:-2]]
    chunks = [json.loads(event) for event in events]
    assert {chunk["adapter_digest"] for chunk in chunks} == {old}
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected
    after = live.complete(**body).json()
    assert after["adapter_digest"] == new != old
    assert after["choices"][0]["text"] != expected


def test_an_engine_that_stops_answers_what_is_left(settings, start, threads, brake):
    live = start(settings)
    held = brake(live, "dec")
    first = threads.submit(live.classify, model="judge", input="w1")
    held.until(lambda: len(held.batches) == 1)
    second = threads.submit(live.classify, model="judge", input="w1")
    held.until(lambda: waiting(live, "dec") == 1)
    live.engine._stopping = True
    held.release()
    assert first.result().status_code == 200
    assert second.result().status_code == 503
    assert live.classify(model="judge", input="w1").status_code == 503


def test_the_thread_that_runs_the_layers_is_warm_before_the_first_request(settings, start, monkeypatch):
    warmed = []
    monkeypatch.setattr(MolexModel, "warm_up", lambda model, rows: warmed.append((current_thread(), rows)))
    worker = start(settings.model_copy(update={"max_batch_tokens": 100})).engine._worker
    assert warmed == [(worker, 100)] * len(settings.bases)


def test_a_worker_that_dies_while_it_warms_up_holds_up_no_start(settings, start, monkeypatch):
    monkeypatch.setattr(MolexModel, "warm_up", None)
    live = start(settings)
    assert live.http.get("/readyz").status_code == 503
    assert live.classify(model="judge", input="w1").status_code == 503


def test_a_dead_worker_leaves_nobody_waiting(settings, start, monkeypatch):
    live = start(settings)
    monkeypatch.setattr(live.engine, "_postprocess", None)
    # The sequence in the broken step is still the scheduler's.
    answer = live.complete(model="dec", prompt="w1")
    assert answer.status_code == 500
    assert live.http.get("/readyz").status_code == 503
