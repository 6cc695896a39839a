"""Trains the example adapters of examples/adapters.

python -m scripts.train_examples                    # all that are missing
python -m scripts.train_examples --only sst2-molex
"""

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from molex.train.arguments import TrainArguments
from molex.train.loop import Listener
from molex.train.metrics import Metrics
from molex.train.recipe import train_adapter

MAX_BYTES = 2_000_000

ENCODER: dict[str, Any] = {"base": "e5-small", "task_type": "SEQ_CLS", "learning_rate": 1e-3}
SST2: dict[str, Any] = {"train": "sst2/train.tsv", "eval": "sst2/dev.tsv", "epochs": 3}
RECIPES: dict[str, dict[str, Any]] = {
    "sst2-molex": ENCODER | SST2 | {"method": "molex"},
    "sst2-lora": ENCODER | SST2 | {"method": "lora"},
    "trec-molex": ENCODER
    | {"train": "trec/train.tsv", "eval": "trec/dev.tsv", "epochs": 4, "method": "molex"},
    "e2e-molex": {
        "base": "smollm2-135m-instruct",
        "task_type": "CAUSAL_LM",
        "method": "molex",
        "train": "e2e/train.jsonl",
        "eval": "e2e/dev.jsonl",
        "learning_rate": 1e-3,
        "batch_size": 16,
        # More than half of an epoch, which takes a CPU core half an hour.
        "max_steps": 150,
        "epochs": 1,
    },
}


class _Lines(Listener):
    """Prints a line now and then."""

    def on_note(self, note: str) -> None:
        print(note, flush=True)

    def on_step(self, step: int, total: int, loss: float) -> None:
        if step % 20 == 0 or step == total:
            print(f"  step {step}/{total}  loss {loss:.3f}", flush=True)

    def on_epoch(self, record: Metrics) -> None:
        print("  " + "  ".join(f"{name} {value:.4g}" for name, value in record.items()), flush=True)


def arguments_of(
    recipe: dict[str, Any], data: Path, models: Path, output: Path, **options: Any
) -> TrainArguments:
    """The arguments of a recipe, with its files found in `data` and its base in `models`."""
    places = {
        "base": str(models / recipe["base"]),
        "train": data / recipe["train"],
        "eval": data / recipe["eval"],
    }
    return TrainArguments(**{**recipe, **places, **options}, output=output, resume=True)


def main(
    data: Path = Path("../shared/data"),
    models: Path = Path(".models"),
    output: Path = Path("examples/adapters"),
    only: Annotated[str | None, typer.Option(help="One recipe.")] = None,
    threads: int | None = None,
) -> None:
    """Train every example adapter that is not there yet."""
    if only is not None and only not in RECIPES:
        raise typer.BadParameter(f"{only!r}: known recipes are {', '.join(RECIPES)}")
    for name, recipe in RECIPES.items():
        folder = output / name
        if name != (only or name) or (folder / "adapter_config.json").exists():
            continue
        print(f"==> {name}", flush=True)
        options = {"dtype": "bfloat16", "threads": threads}
        train_adapter(arguments_of(recipe, data, models, folder, **options), listener=_Lines())
        size = sum(path.stat().st_size for path in folder.iterdir())
        if size > MAX_BYTES:
            shutil.rmtree(folder)
            raise SystemExit(f"{name} takes {size} bytes, more than {MAX_BYTES}")
        print(f"{folder}: {size} bytes", flush=True)


if __name__ == "__main__":
    typer.run(main)
