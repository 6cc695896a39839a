"""What `molex serve` prints when it is up: what it serves, and commands to try."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from server.engine import Engine


def banner(engine: Engine, url: str, admin_url: str, refused: Mapping[str, str]) -> str:
    """The bases, the adapters, the refused ones with their reason, and curl commands that work here."""
    return "\n".join(["", *_inventory(engine, refused), "", *_commands(engine, url, admin_url), ""])


def _inventory(engine: Engine, refused: Mapping[str, str]) -> Iterator[str]:
    yield "Bases"
    for base in engine.bases.values():
        spec = base.model.spec
        where = "" if base.model.device.type == "cpu" else f" on {base.model.device}"
        model = f"{spec.model_type}, {spec.num_layers} layers, {base.model.dtype}{where}"
        yield f"  {base.name}: {model}, runs on {base.model.runs_on}"
    yield "Adapters"
    for served in engine.adapters.all():
        config = served.config
        size = f"rank {config.r}, {served.nbytes / 1e6:.1f} MB"
        yield f"  {served.name}: {config.kind} {config.task_type} on {served.base}, {size}"
    if not engine.adapters.all():
        yield "  none"
    for name, reason in refused.items():
        yield f"  {name}: REFUSED, {reason}"


def _commands(engine: Engine, url: str, admin_url: str) -> Iterator[str]:
    key = '-H "authorization: Bearer $MOLEX_KEY" ' if engine.settings.database else ""
    yield "Try, with an API key in MOLEX_KEY" if key else "Try"
    if name := _first(engine, "SEQ_CLS"):
        text = "A warm, funny and beautifully acted film."
        yield _post(key + url, "/v1/classify", {"model": name, "input": text, "return_routes": True})
    if name := _first(engine, "CAUSAL_LM"):
        prompt = "name : Alimentum | area : city centre | family friendly : no"
        body = {"model": name, "prompt": prompt, "max_tokens": 40, "temperature": 0, "stream": True}
        yield _post(key + url, "/v1/completions", body)
    yield f"  curl {key}{url}/v1/models"
    yield f"  curl {key}{admin_url}/metrics"


def _first(engine: Engine, task: str) -> str | None:
    """The first adapter for a task, if there is one; MoLEx before LoRA."""
    adapters = [served for served in engine.adapters.all() if served.config.task_type == task]
    adapters.sort(key=lambda served: served.config.kind != "molex")
    return adapters[0].name if adapters else None


def _post(url: str, path: str, body: Mapping[str, object]) -> str:
    header = "-H 'content-type: application/json'"
    return f"  curl -N {url}{path} {header} -d '{json.dumps(body)}'"
