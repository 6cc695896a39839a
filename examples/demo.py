"""Serves the demo bases and the example adapters, sends real requests to all of them at once, stops.

Run it as `make demo`. It ends with status 0 only if every request got a complete answer and the server
stopped in order.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

import httpx
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

PROJECT = Path(__file__).resolve().parents[1]
BASES = {"e5-small": ".models/e5-small", "smollm2": ".models/smollm2-135m-instruct"}
ADAPTERS = PROJECT / "examples" / "adapters"
READY_SECONDS = 180
"""The first start on a machine compiles the kernels."""
STOP_SECONDS = 40
"""Longer than the server's own grace period."""

REVIEWS = (
    "A warm, funny and beautifully acted film.",
    "Two hours of my life that I will never get back.",
    "The plot is thin, but the cast is a joy to watch.",
    "Loud, long and completely lifeless.",
)
QUESTIONS = (
    "Who painted the ceiling of the Sistine Chapel?",
    "How many legs does a lobster have?",
    "Where is the highest waterfall in the world?",
    "What does NASA stand for?",
)
TEXTS = {"sst2-molex": REVIEWS, "sst2-lora": REVIEWS, "trec-molex": QUESTIONS}
RESTAURANTS = (
    "name : Blue Spice | Type : coffee shop | area : riverside | family friendly : yes",
    "name : The Golden Palace | food : Chinese | price : cheap | customer rating : 5 out of 5",
    "name : The Copper Kettle | food : English | area : city centre | near : Burger King",
)
CHAT = "Name three fruits. Answer in one short sentence."

# A pipe or a file has no width of its own: wide enough there that no cell of the first table wraps.
console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)


class DemoError(Exception):
    """Something that a working server does not do; the message says what."""


@dataclass(frozen=True)
class Classified:
    """One answer of /v1/classify; times in milliseconds."""

    adapter: str
    text: str
    label: str
    probability: float
    routes: Sequence[int | Sequence[int]]
    queue: float
    forward: float
    total: float


@dataclass(frozen=True)
class Generated:
    """One streamed generation; times in milliseconds, taken by the client."""

    model: str
    prompt: str
    text: str
    routes: Sequence[int | Sequence[int]]
    tokens: int
    first_token: float
    total: float


# The server, as a process of its own


@contextmanager
def running_server(bases: Mapping[str, str], adapters: Path) -> Iterator[str]:
    """Run `molex serve` on a free port; yields its URL once it is ready and stops it in the end.

    Raises DemoError where it does not start, or does not stop in order.
    """
    command = [str(Path(sys.executable).with_name("molex")), "serve", "--port", "0", "--log-level", "warning"]
    for name, folder in bases.items():
        command += ["--base", f"{name}={PROJECT / folder}"]
    command += ["--adapters", str(adapters)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            yield _wait_until_ready(process, log)
        finally:
            _stop(process, log)


def _wait_until_ready(process: subprocess.Popen[str], log: IO[str]) -> str:
    """The URL that the server prints when it listens, once /readyz agrees."""
    begin = time.monotonic()
    console.print(f"Starting molex serve with {', '.join(BASES)} and the example adapters")
    with console.status("Loading …"):
        url = _announced_url(process)
        while url and time.monotonic() - begin < READY_SECONDS:
            if httpx.get(f"{url}/readyz").status_code == 200:
                console.print(f"Ready on {url} after {time.monotonic() - begin:.1f} s")
                return url
            time.sleep(0.1)
    raise DemoError(f"the server did not become ready:\n{_tail(log)}")


def _announced_url(process: subprocess.Popen[str]) -> str | None:
    """Reads the server's greeting up to its last line, which names the URL; None if the server ends."""
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"curl (http://\S+)/metrics", line):
            return found[1]
    return None


def _stop(process: subprocess.Popen[str], log: IO[str]) -> None:
    """SIGTERM, and wait. uvicorn passes the signal on after an orderly end, so it is a good status too."""
    process.send_signal(signal.SIGTERM)
    try:
        status = process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise DemoError(f"the server did not stop in {STOP_SECONDS} s") from None
    finally:
        if process.stdout is not None:
            process.stdout.close()
    if status not in (0, -signal.SIGTERM):
        raise DemoError(f"the server ended with status {status}:\n{_tail(log)}")
    if "Traceback" in (errors := _tail(log)):
        raise DemoError(f"the server logged an exception:\n{errors}")


def _tail(log: IO[str]) -> str:
    log.seek(0)
    return "".join(log.readlines()[-30:])


# The requests


async def classify(http: httpx.AsyncClient, adapter: str, text: str) -> Classified:
    body = {"model": adapter, "input": text, "return_routes": True}
    response = await http.post("/v1/classify", json=body)
    _require(response.status_code == 200, f"{adapter}: status {response.status_code}, {response.text}")
    answer = response.json()
    _require(answer["adapter_digest"].startswith("sha256:"), f"{adapter}: no digest in the answer")
    _require(len(answer["data"]) == 1, f"{adapter}: {len(answer['data'])} answers for one text")
    data = answer["data"][0]
    _require(abs(sum(data["probs"]) - 1) < 1e-3, f"{adapter}: the probabilities do not sum to 1")
    stages = ("x-queue-time", "x-inference-time", "x-total-time")
    queue, forward, total = (float(response.headers[stage]) for stage in stages)
    return Classified(adapter, text, data["label"], max(data["probs"]), data["routes"], queue, forward, total)


async def generate(http: httpx.AsyncClient, path: str, prompt: str, body: dict[str, Any]) -> Generated:
    """Stream one greedy generation. `path` is the endpoint, `body` names the model and holds the prompt."""
    model = body["model"]
    options = {"temperature": 0, "stream": True, "return_routes": True}
    body |= options | {"stream_options": {"include_usage": True}}
    begin = time.perf_counter()
    first_token: float | None = None
    text, routes, tokens = "", None, 0
    async for chunk in _events(http, path, body):
        is_base = model in BASES
        _require(is_base or bool(chunk["adapter_digest"]), f"{model}: no digest in a chunk")
        for choice in chunk["choices"]:
            new = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            first_token = first_token or (time.perf_counter() if new else None)
            text += new
            routes = choice.get("routes", routes)
        if chunk["usage"]:
            tokens = chunk["usage"]["completion_tokens"]
    _require(bool(text.strip()) and first_token is not None, f"{model}: no text")
    _require(routes is not None and tokens > 0, f"{model}: the stream has no last chunk")
    assert first_token is not None
    assert routes is not None
    total = time.perf_counter() - begin
    return Generated(
        model, prompt, " ".join(text.split()), routes, tokens, 1000 * (first_token - begin), 1000 * total
    )


async def _events(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> AsyncIterator[Any]:
    """The chunks of a stream, which has to end with [DONE]."""
    async with http.stream("POST", path, json=body) as response:
        if response.status_code != 200:
            await response.aread()
            raise DemoError(f"{body['model']}: status {response.status_code}, {response.text}")
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return
            if line:
                event = json.loads(line.removeprefix("data: "))
                _require("error" not in event, f"{body['model']}: {event.get('error')}")
                yield event
    raise DemoError(f"{body['model']}: the stream broke off")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise DemoError(problem)


async def ask_everything(url: str) -> list[Classified | Generated | BaseException]:
    """Send all requests at the same moment; the answers, or what went wrong, in their order."""
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        work: list[Awaitable[Classified | Generated]] = [
            classify(http, adapter, text) for adapter, texts in TEXTS.items() for text in texts
        ]
        for prompt in RESTAURANTS:
            body = {"model": "e2e-molex", "prompt": prompt, "max_tokens": 48}
            work.append(generate(http, "/v1/completions", prompt, body))
        messages = [{"role": "user", "content": CHAT}]
        body = {"model": "smollm2", "messages": messages, "max_tokens": 48}
        work.append(generate(http, "/v1/chat/completions", CHAT, body))
        return await asyncio.gather(*work, return_exceptions=True)


# The tables


def classification_table(answers: Sequence[Classified]) -> Table:
    table = Table(title="Classification (ms)", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("adapter", "text", "label"):
        table.add_column(name, no_wrap=name != "text")
    table.add_column("probability", justify="right")
    table.add_column("layer chosen at each depth")
    for name in ("queue", "forward", "total"):
        table.add_column(name, justify="right")
    for a in answers:
        times = (f"{value:.1f}" for value in (a.queue, a.forward, a.total))
        table.add_row(a.adapter, a.text, a.label, f"{a.probability:.3f}", _route(a.routes), *times)
    return table


def generation_table(answers: Sequence[Generated]) -> Table:
    table = Table(
        title="Generation, streamed (ms)", title_justify="left", box=box.SIMPLE_HEAD, show_lines=True
    )
    table.add_column("model", no_wrap=True)
    table.add_column("prompt, text, layer chosen at each depth")
    for name in ("tokens", "first token", "total"):
        table.add_column(name, justify="right")
    for a in answers:
        cell = Text.assemble((f"{a.prompt}\n", "dim"), a.text, (f"\n{_route(a.routes)}", "dim"))
        table.add_row(a.model, cell, str(a.tokens), f"{a.first_token:.0f}", f"{a.total:.0f}")
    return table


def _route(routes: Sequence[int | Sequence[int]]) -> str:
    """One layer a depth; for top-2 both, joined by a plus sign."""
    return " ".join(str(r) if isinstance(r, int) else "+".join(map(str, r)) for r in routes) or "–"


def main(
    adapters: Annotated[Path, typer.Option(help="Folder of the adapters to serve.")] = ADAPTERS,
) -> None:
    """Start, ask, print, stop."""
    try:
        with running_server(BASES, adapters) as url:
            answers = asyncio.run(ask_everything(url))
            console.print(classification_table([a for a in answers if isinstance(a, Classified)]))
            console.print(generation_table([a for a in answers if isinstance(a, Generated)]))
            if problems := [str(a) or repr(a) for a in answers if isinstance(a, BaseException)]:
                raise DemoError("\n".join(problems))
    except DemoError as error:
        console.print(f"FAILED\n{error}", style="red", markup=False)
        sys.exit(1)
    console.print(f"{len(answers)} requests answered; the server has stopped.")


if __name__ == "__main__":
    typer.run(main)
