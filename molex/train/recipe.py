"""What `molex train` and `molex evaluate` do, for use from Python."""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from molex._version import __version__
from molex.adapter import Adapter, new_adapter
from molex.adapter_file import read_adapter, write_adapter
from molex.errors import BaseModelError
from molex.model import MolexModel
from molex.tokenizer import load_tokenizer
from molex.train.arguments import (
    ArgumentError,
    EvaluateArguments,
    TrainArguments,
    adapter_config,
    as_json,
    complete,
    identity,
)
from molex.train.checkpoint import checkpoint_folders, remove_checkpoints
from molex.train.data import (
    Dataset,
    PromptText,
    label_indices,
    label_names,
    label_values,
    read_labelled,
    read_prompts,
)
from molex.train.encoding import Encoded, encode_labelled, encode_prompts
from molex.train.evaluate import evaluate_generation, evaluate_items
from molex.train.loop import Listener, LoopOptions, Trainer
from molex.train.metrics import Metrics

RECORD_FILE = "training.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Bounds generation while `bleu` or `chrf` picks the best epoch.
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Base:
    """A base model and its tokenizer."""

    model: MolexModel
    tokenizer: Any


@dataclass(frozen=True)
class Prepared:
    """One data file, read and tokenized."""

    name: str
    digest: str
    encoded: Encoded
    prompts: Dataset[PromptText] | None = None
    """The texts of a generation file, for metrics that compare texts."""

    def summary(self) -> dict[str, Any]:
        """What a record says about the file."""
        return {
            "file": self.name,
            "digest": self.digest,
            "items": len(self.encoded.items),
            "tokens": self.encoded.num_tokens,
            "truncated": self.encoded.truncated,
        }


def load_base(base: str, dtype: str = "float32") -> Base:
    """Load a base and its tokenizer, from a folder or the hub."""
    model = MolexModel.from_pretrained(base, dtype=DTYPES[dtype])
    return Base(model, load_tokenizer(base, model.spec))


def train_adapter(
    arguments: TrainArguments, base: Base | None = None, listener: Listener | None = None
) -> dict[str, Any]:
    """Train an adapter, write its folder and return what `training.json` says.

    `base` spares loading the base again; it must be the one that the arguments name.

    Raises:
        ArgumentError, DataError, TrainingError, BaseModelError: see each.
    """
    started = time.perf_counter()
    _check_output(arguments.output, arguments.resume)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    base = base or load_base(arguments.base, arguments.dtype)
    if base.model.backbone.exported is not None:
        raise BaseModelError(f"base model {arguments.base!r} was exported: graphs cannot be trained")
    arguments = complete(arguments, base.model.spec)
    labels, train, evaluation = _prepare(arguments, base)
    adapter = _new_adapter(arguments, base.model, labels)
    listener = listener or Listener()
    for data in (train, evaluation):
        listener.on_note(_note(data, arguments))
    trainer = Trainer(
        model=base.model,
        adapter=adapter,
        items=train.encoded.items,
        evaluate=_evaluator(arguments, base, adapter, evaluation),
        options=_loop_options(arguments),
        output=arguments.output,
        identity=identity(arguments) | {"train": train.digest, "eval": evaluation.digest},
        listener=listener,
    )
    trainer.run(arguments.resume)
    write_adapter(adapter, arguments.output)
    record = _record(arguments, trainer, train, evaluation, time.perf_counter() - started)
    text = json.dumps(record, indent=2) + "\n"
    (arguments.output / RECORD_FILE).write_text(text, encoding="utf-8")
    remove_checkpoints(arguments.output)
    return record


def evaluate_adapter(arguments: EvaluateArguments, base: Base | None = None) -> dict[str, Any]:
    """Evaluate an adapter folder on a data file: its metrics, and what was read.

    Raises:
        AdapterError, DataError, BaseModelError: see each.
    """
    started = time.perf_counter()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if base is None:
        base = load_base(arguments.base, arguments.dtype)
        base.model.prepack()
    model = base.model
    adapter = read_adapter(arguments.adapter, model.spec, dtype=model.dtype)
    max_length = arguments.max_length or model.spec.max_length
    if adapter.task_type == "SEQ_CLS":
        names = [adapter.id2label[index] for index in range(adapter.num_labels)]
        labels = None if adapter.regression else names
        data = prepare_labelled(arguments.data, base, labels, max_length)
    else:
        data = prepare_prompts(arguments.data, base, max_length)
    metrics = evaluate_items(model, adapter, data.encoded.items)
    if data.prompts is not None and arguments.generate:
        metrics |= evaluate_generation(model, adapter, base.tokenizer, data.prompts, arguments.max_tokens)
    seconds = round(time.perf_counter() - started, 2)
    summary = data.summary()
    return {"metrics": metrics, "data": summary, "digest": adapter.digest, "seconds": seconds}


def prepare_labelled(path: Path, base: Base, labels: list[str] | None, max_length: int) -> Prepared:
    """Read and tokenize a file whose labels are among `labels` or, where that is None, numbers."""
    dataset = read_labelled(path, regression=labels is None)
    targets = label_values(dataset) if labels is None else label_indices(dataset, labels)
    encoded = encode_labelled(base.tokenizer, dataset, targets, max_length)
    return Prepared(dataset.name, dataset.digest, encoded)


def prepare_prompts(path: Path, base: Base, max_length: int) -> Prepared:
    """Read and tokenize a generation file."""
    dataset = read_prompts(path)
    encoded = encode_prompts(base.tokenizer, dataset, max_length)
    return Prepared(dataset.name, dataset.digest, encoded, dataset)


def _check_output(output: Path, resume: bool) -> None:
    if output.exists() and not output.is_dir():
        raise ArgumentError(f"--output {output.name}: not a folder")
    if (output / "adapter_config.json").exists():
        raise ArgumentError(f"--output {output.name}: already holds an adapter; use another folder")
    if checkpoint_folders(output) and not resume:
        raise ArgumentError(
            f"--output {output.name}: holds an unfinished run; continue it with --resume "
            "or use another folder"
        )


def _prepare(arguments: TrainArguments, base: Base) -> tuple[list[str] | None, Prepared, Prepared]:
    """The classes of a classifier (None: there are none), the training data and the evaluation data."""
    assert arguments.max_length is not None
    length = arguments.max_length
    if arguments.task_type == "CAUSAL_LM":
        train, evaluation = (
            prepare_prompts(path, base, length) for path in (arguments.train, arguments.eval)
        )
        return None, train, evaluation
    labels = None if arguments.problem_type == "regression" else label_names(read_labelled(arguments.train))
    if arguments.metric == "f1" and labels is not None and len(labels) > 2:
        raise ArgumentError("--metric f1 is for two classes; use f1_macro")
    train, evaluation = (
        prepare_labelled(path, base, labels, length) for path in (arguments.train, arguments.eval)
    )
    return labels, train, evaluation


def _new_adapter(arguments: TrainArguments, model: MolexModel, labels: list[str] | None) -> Adapter:
    alpha = 1.0 if arguments.alpha is None else arguments.alpha
    return new_adapter(
        model.spec,
        adapter_config(arguments, model.spec, labels),
        num_labels=1 if arguments.problem_type == "regression" else len(labels or ()),
        mix=(alpha, 1 - alpha),
        seed=arguments.seed,
    )


def _loop_options(arguments: TrainArguments) -> LoopOptions:
    assert arguments.metric is not None
    return LoopOptions(
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        metric=arguments.metric,
        balance_coefficient=arguments.balance_coefficient or 0.0,
        max_steps=arguments.max_steps,
        patience=arguments.patience,
        seed=arguments.seed,
    )


def _note(data: Prepared, arguments: TrainArguments) -> str:
    encoded = data.encoded
    cut = f", {encoded.truncated} cut to {arguments.max_length} tokens" if encoded.truncated else ""
    return f"{data.name}: {len(encoded.items)} items, {encoded.num_tokens} tokens{cut}"


def _evaluator(
    arguments: TrainArguments, base: Base, adapter: Adapter, data: Prepared
) -> Callable[[], Metrics]:
    def evaluate() -> Metrics:
        metrics = evaluate_items(base.model, adapter, data.encoded.items)
        if data.prompts is None or arguments.metric in metrics:
            return metrics
        generated = evaluate_generation(base.model, adapter, base.tokenizer, data.prompts, MAX_NEW_TOKENS)
        return metrics | generated

    return evaluate


def _record(
    arguments: TrainArguments,
    trainer: Trainer,
    train: Prepared,
    evaluation: Prepared,
    seconds: float,
) -> dict[str, Any]:
    best = trainer.best_epoch()
    return {
        "arguments": as_json(arguments),
        "seed": arguments.seed,
        "data": {"train": train.summary(), "eval": evaluation.summary()},
        "trainable_parameters": sum(t.numel() for t in trainer.parameters.values()),
        "epochs": trainer.records,
        "best_epoch": best,
        "metrics": None if best is None else trainer.records[best],
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "molex": __version__,
        },
    }
