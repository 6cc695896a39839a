"""What MoLEx costs on a GPU: one request with a MoLEx adapter over one with a LoRA adapter, in bfloat16.

    python -m benchmarks.bench_gpu [--rounds 30] [--device cuda]

A classification of one sentence on the demo encoder, text to logits, and a step of one generation on the demo
decoder, whose pinned route lets it run as a CUDA graph. Adapters mix at every depth. Where there is no GPU
there is nothing to measure; `--device cpu` runs the same on the CPU's kernels and holds it to nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common import (
    DEMO_ENCODER,
    PROJECT,
    Contestant,
    behave_as_the_server,
    command_line,
    in_turn,
    measure,
    milliseconds,
    mixing_everywhere,
    random_adapter,
    report,
    sentences,
)
from benchmarks.figures import Figure, save
from molex import MolexModel, Row
from molex.adapter import Adapter
from molex.kv_cache import pages_for

DEMO_DECODER = PROJECT / ".models" / "smollm2-135m-instruct"
REPEATS = 20
"""Requests and steps that are timed together: one is too short for the clock of a shared machine."""
PROMPT_TOKENS, ROOM = 48, 64
BOUND = 1.15


def model_on(folder: Path, device: str) -> MolexModel:
    model = MolexModel.from_pretrained(folder, torch.bfloat16, device)
    model.prepack()
    return model


def done(model: MolexModel, contestant: Contestant) -> Contestant:
    """The contestant, timed until the device has done its work."""

    def run() -> None:
        with torch.inference_mode():
            contestant()
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    return run


def classification(model: MolexModel, adapter: Adapter) -> Contestant:
    """One sentence at a time, each of another length, as they come to a server that is hardly busy."""
    rows = [Row(ids, adapter) for ids in sentences(REPEATS, seed=1)]

    def classify(row: Row) -> Contestant:
        return lambda: model.run([row]).logits[0].cpu()

    return done(model, in_turn([classify(row) for row in rows]))


def decoding(model: MolexModel, adapter: Adapter) -> Contestant:
    """Steps of one generation behind a prompt, every time the same ones."""
    cache = model.new_cache(pages_for(PROMPT_TOKENS + ROOM, adapter.num_streams))
    slot = cache.allocate(PROMPT_TOKENS + ROOM, adapter.num_streams)
    tokens = [7 + n for n in range(PROMPT_TOKENS)]
    with torch.inference_mode():
        route = model.run([Row(tokens, adapter, slot=slot)], cache).routes[0]

    def step(start: int) -> Contestant:
        row = Row(tokens[:1], adapter, slot=slot, start=start, route=route)
        return lambda: model.run([row], cache).logits[0].argmax().item()

    return done(model, in_turn([step(PROMPT_TOKENS + n) for n in range(REPEATS)]))


def compare(
    title: str,
    model: MolexModel,
    contestant: Callable[[MolexModel, Adapter], Contestant],
    rounds: int,
) -> Figure:
    """The figure of one kind of work; held to its bound on a GPU alone."""
    mixtures = {"LoRA": None, "MoLEx": mixing_everywhere(model.spec)}
    contestants = {
        name: contestant(model, random_adapter(model.spec, 1, mixture, model.device))
        for name, mixture in mixtures.items()
    }
    medians = measure(contestants, rounds)
    ratio = medians["MoLEx"] / medians["LoRA"]
    report(title, medians, {"MoLEx / LoRA": ratio})
    bound = BOUND if model.device.type == "cuda" else None
    measured = milliseconds(medians, list(contestants))
    return Figure("P12", f"MoLEx / LoRA, {title}", ratio, bound, False, "x", measured)


def main() -> None:
    parser = command_line(__doc__, rounds=30)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, …; cpu to try the script")
    arguments = parser.parse_args()
    behave_as_the_server()
    if arguments.device != "cpu" and not torch.cuda.is_available():
        print("There is no GPU here, or this PyTorch cannot use it: nothing was measured.")
        return
    name = "CPU" if arguments.device == "cpu" else torch.cuda.get_device_name(arguments.device)
    encoder, decoder = (model_on(folder, arguments.device) for folder in (DEMO_ENCODER, DEMO_DECODER))
    figures = [
        compare(f"{REPEATS} classifications, {name}", encoder, classification, arguments.rounds),
        compare(f"{REPEATS} steps of a generation, {name}", decoder, decoding, arguments.rounds),
    ]
    save(figures, "bench_gpu", arguments.output)


if __name__ == "__main__":
    main()
