"""The training loop: one adapter on one frozen base, over the forward pass that serves it."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from molex.adapter import Adapter
from molex.errors import MolexError
from molex.model import MolexModel
from molex.train.batches import Batch, shuffled_batches
from molex.train.checkpoint import (
    Checkpoint,
    load_checkpoint,
    prefixed,
    save_checkpoint,
    unprefixed,
)
from molex.train.encoding import Item
from molex.train.loss import make_rows, prediction_loss
from molex.train.metrics import Metrics, is_better

WARMUP_SHARE = 0.06
MAX_GRADIENT_NORM = 1.0
CHECKPOINT_STEPS = 200
"""Steps between checkpoints; there is one after every epoch besides."""


class TrainingError(MolexError):
    """Training cannot start, continue or go on; the message says why."""


@dataclass(frozen=True)
class LoopOptions:
    """Hyperparameters of the loop."""

    epochs: int
    batch_size: int
    learning_rate: float
    metric: str
    """The metric that early stopping watches and that picks the best epoch."""
    balance_coefficient: float = 0.0
    max_steps: int | None = None
    patience: int | None = None
    """Epochs in a row without improvement after which training stops; None: never."""
    seed: int = 0


class Listener:
    """What the loop tells its caller while it runs; this one does not listen."""

    def on_note(self, note: str) -> None:
        """Before the first step: a sentence about the data."""

    def on_step(self, step: int, total: int, loss: float) -> None:
        """After every step: the steps done, the steps in all and the step's loss."""

    def on_epoch(self, record: Metrics) -> None:
        """After every epoch: its record."""


def set_seeds(seed: int) -> None:
    """Seed the generators of python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def learning_rate_factor(step: int, total: int) -> float:
    """Share of the learning rate at `step` of `total`: linear warm-up, then linear decay to 0."""
    warmup = math.ceil(WARMUP_SHARE * total)
    if step < warmup:
        return (step + 1) / warmup
    return (total - step) / (total - warmup)


@dataclass
class Trainer:
    """Trains the leaves of `adapter` on `items`.

    `evaluate` returns the metrics of the adapter as it is at the moment; after every epoch they
    decide whether this one is the best so far. Checkpoints go to `output`; `identity` is what two
    runs must share for one to continue the other.
    """

    model: MolexModel
    adapter: Adapter
    items: Sequence[Item]
    evaluate: Callable[[], Metrics]
    options: LoopOptions
    output: Path
    identity: dict[str, Any] = field(default_factory=dict)
    listener: Listener = field(default_factory=Listener)

    def __post_init__(self) -> None:
        self.parameters = dict(self.adapter.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=self.options.learning_rate, weight_decay=0.0
        )
        self.steps_per_epoch = math.ceil(len(self.items) / self.options.batch_size)
        total = self.options.epochs * self.steps_per_epoch
        self.total_steps = min(total, self.options.max_steps or total)
        self.step = 0
        self.loss_sum = 0.0  # over the steps since the last record
        self.records: list[Metrics] = []  # one an epoch
        self.best = _copies(self.parameters)
        self._plan: tuple[int, list[Batch]] = (-1, [])

    def run(self, resume: bool = False) -> list[Metrics]:
        """Train to the end, leave the best epoch's weights in the adapter, return all records.

        Raises:
            TrainingError: the loss is not finite, or the checkpoint belongs to another run.
        """
        set_seeds(self.options.seed)
        if resume:
            self._resume()
        while self.step < self.total_steps and not self._out_of_patience():
            self._train_step()
            if self.step % self.steps_per_epoch == 0 or self.step == self.total_steps:
                self._close_epoch()
            elif self.step % CHECKPOINT_STEPS == 0:
                self._save()
        _assign(self.parameters, self.best)
        return self.records

    def best_epoch(self) -> int | None:
        """Index of the record with the best metric; None before the first record."""
        best: int | None = None
        for index, record in enumerate(self.records):
            value = None if best is None else self.records[best][self.options.metric]
            if is_better(self.options.metric, record[self.options.metric], value):
                best = index
        return best

    def _train_step(self) -> None:
        items = [self.items[index] for index in self._batch()]
        loss = self._loss(items)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(f"the loss at step {self.step + 1} is {value}; try a lower learning rate")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip_grad_norm_(self.parameters.values(), MAX_GRADIENT_NORM)
        factor = learning_rate_factor(self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * factor
        self.optimizer.step()
        self.step += 1
        self.loss_sum += value
        self.listener.on_step(self.step, self.total_steps, value)

    def _loss(self, items: Sequence[Item]) -> Tensor:
        output = self.model.run(make_rows(self.adapter, items), lm_logits="all")
        loss = prediction_loss(self.adapter, output.logits, items).mean()
        return loss + self.options.balance_coefficient * output.balance_loss

    def _batch(self) -> Batch:
        epoch, position = divmod(self.step, self.steps_per_epoch)
        if self._plan[0] != epoch:
            lengths = [len(item.token_ids) for item in self.items]
            seed, size = self.options.seed, self.options.batch_size
            self._plan = (epoch, shuffled_batches(lengths, size, seed, epoch))
        return self._plan[1][position]

    def _close_epoch(self) -> None:
        steps = (self.step - 1) % self.steps_per_epoch + 1
        record = {"step": self.step, "train_loss": self.loss_sum / steps, **self.evaluate()}
        self.loss_sum = 0.0
        self.records.append(record)
        if self.best_epoch() == len(self.records) - 1:
            self.best = _copies(self.parameters)
        self._save()
        self.listener.on_epoch(record)

    def _out_of_patience(self) -> bool:
        if self.options.patience is None or not self.records:
            return False
        best = self.best_epoch()
        return len(self.records) - 1 - (0 if best is None else best) >= self.options.patience

    def _save(self) -> None:
        tensors = {
            **prefixed("adapter", self.parameters),
            **prefixed("best", self.best),
            **prefixed("optimizer", self._optimizer_state()),
            "rng": torch.get_rng_state(),
        }
        progress = {
            "step": self.step,
            "loss_sum": self.loss_sum,
            "records": self.records,
            "identity": self.identity,
        }
        save_checkpoint(self.output, self.step, Checkpoint(tensors, progress))

    def _resume(self) -> None:
        checkpoint = load_checkpoint(self.output)
        if checkpoint is None:
            return
        self._check_identity(checkpoint.progress["identity"])
        self.step = checkpoint.progress["step"]
        self.loss_sum = checkpoint.progress["loss_sum"]
        self.records = list(checkpoint.progress["records"])
        _assign(self.parameters, unprefixed("adapter", checkpoint.tensors))
        self.best = unprefixed("best", checkpoint.tensors)
        self._restore_optimizer(unprefixed("optimizer", checkpoint.tensors))
        torch.set_rng_state(checkpoint.tensors["rng"])

    def _check_identity(self, saved: dict[str, Any]) -> None:
        for name, value in self.identity.items():
            if saved.get(name) != value:
                raise TrainingError(
                    f"cannot resume in {self.output.name}: {name} is {value!r}, "
                    f"but the checkpoint was made with {saved.get(name)!r}"
                )

    def _optimizer_state(self) -> dict[str, Tensor]:
        """Adam's tensors by `<parameter>/<key>`; a parameter without gradients has none."""
        return {
            f"{name}/{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def _restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            state = unprefixed(name, tensors)
            if state:
                self.optimizer.state[parameter] = state


def _copies(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def _assign(parameters: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
