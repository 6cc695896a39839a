"""The loop: it learns, repeats itself, resumes exactly and leaves the base alone."""

import hashlib
from itertools import pairwise

import pytest

from molex.errors import BaseModelError
from molex.export import export
from molex.train.arguments import TrainArguments
from molex.train.checkpoint import checkpoint_folders
from molex.train.loop import Listener, TrainingError, learning_rate_factor
from molex.train.recipe import load_base, train_adapter
from tests.tiny import tiny_base

MOLEX = {"method": "molex", "alpha": 0.6}


class Stop(Listener):
    """Interrupts after some steps, as a signal would."""

    def __init__(self, step):
        self.last = step

    def on_step(self, step, total, loss):
        if step == self.last:
            raise KeyboardInterrupt


def arguments(files, output, **changes):
    options = {"epochs": 4, "batch_size": 16, "learning_rate": 2e-2, "r": 4} | changes
    return TrainArguments(base="tiny", train=files[0], eval=files[1], output=output, **options)


def weights(output):
    return (output / "adapter_model.safetensors").read_bytes()


def base_digest(base):
    tensors = [*base.model.backbone.layers.blocks[0].parameters()]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()


@pytest.mark.parametrize(
    "method",
    [
        {"method": "lora"},
        {"method": "lora", "lora_dropout": 0.1},
        MOLEX | {"gate_gradient": "none"},
        MOLEX | {"gate_gradient": "straight_through"},
        MOLEX | {"mix": "learned", "gate": "cosine", "gate_scope": "depth", "projection_dim": 8},
        MOLEX | {"vote": "mean", "vote_score": "sigmoid", "top_k": 2, "mixed_depths": "0-2,4"},
    ],
    ids=lambda method: " ".join(str(value) for value in method.values()),
)
def test_learns_to_tell_two_classes_apart(encoder, labelled_files, tmp_path, method):
    before = base_digest(encoder)
    record = train_adapter(arguments(labelled_files, tmp_path, **method), encoder)
    assert record["epochs"][-1]["train_loss"] < record["epochs"][0]["train_loss"] / 2
    assert record["metrics"]["accuracy"] == 1.0
    assert base_digest(encoder) == before


@pytest.mark.parametrize("method", [{"method": "lora"}, MOLEX, MOLEX | {"gate_gradient": "none"}], ids=str)
def test_learns_to_complete(decoder, prompt_files, tmp_path, method):
    options = {"task_type": "CAUSAL_LM", "epochs": 8, "batch_size": 8, **method}
    record = train_adapter(arguments(prompt_files, tmp_path, **options), decoder)
    assert record["epochs"][-1]["train_loss"] < record["epochs"][0]["train_loss"] / 2
    assert record["metrics"]["perplexity"] < 10


def test_bfloat16_base_with_float32_adapter(labelled_files, tmp_path):
    encoder = load_base(str(tiny_base("roberta", tmp_path / "base")), "bfloat16")
    record = train_adapter(arguments(labelled_files, tmp_path / "run", dtype="bfloat16"), encoder)
    assert record["metrics"]["accuracy"] == 1.0


@pytest.mark.parametrize("interrupted_after", [7, 12])
def test_a_resumed_run_equals_an_uninterrupted_one(
    encoder, labelled_files, tmp_path, monkeypatch, interrupted_after
):
    monkeypatch.setattr("molex.train.loop.CHECKPOINT_STEPS", 5)
    options = MOLEX | {"lora_dropout": 0.2, "epochs": 3}
    whole = arguments(labelled_files, tmp_path / "whole", **options)
    expected = train_adapter(whole, encoder)
    cut = arguments(labelled_files, tmp_path / "cut", **options)
    with pytest.raises(KeyboardInterrupt):
        train_adapter(cut, encoder, Stop(interrupted_after))
    resumed = arguments(labelled_files, tmp_path / "cut", resume=True, **options)
    record = train_adapter(resumed, encoder)
    assert record["epochs"] == expected["epochs"]
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert checkpoint_folders(tmp_path / "cut") == []


def test_a_seed_repeats_and_another_differs(encoder, labelled_files, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_adapter(arguments(labelled_files, tmp_path / name, seed=seed, epochs=1, method="lora"), encoder)
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_resuming_another_run_is_refused_by_name(encoder, labelled_files, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train_adapter(arguments(labelled_files, tmp_path), encoder, Stop(8))
    with pytest.raises(TrainingError, match=r"learning_rate is 0.5, .* with 0.02"):
        train_adapter(arguments(labelled_files, tmp_path, resume=True, learning_rate=0.5), encoder)


def test_the_best_epoch_is_kept_and_patience_ends_training(encoder, labelled_files, tmp_path):
    record = train_adapter(arguments(labelled_files, tmp_path, epochs=30, patience=2), encoder)
    best = record["best_epoch"]
    accuracies = [epoch["accuracy"] for epoch in record["epochs"]]
    assert accuracies.index(max(accuracies)) == best
    assert len(accuracies) == best + 3


def test_max_steps_ends_in_the_middle_of_an_epoch(encoder, labelled_files, tmp_path):
    record = train_adapter(arguments(labelled_files, tmp_path, max_steps=8), encoder)
    assert [epoch["step"] for epoch in record["epochs"]] == [6, 8]


def test_a_diverging_loss_is_an_error(encoder, labelled_files, tmp_path):
    with pytest.raises(TrainingError, match=r"the loss at step .* is nan; try a lower learning"):
        train_adapter(arguments(labelled_files, tmp_path, learning_rate=1e30), encoder)


def test_learning_rate_rises_then_falls_to_zero():
    factors = [learning_rate_factor(step, 100) for step in range(101)]
    assert factors[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert factors[6] == 1.0
    assert all(a > b for a, b in pairwise(factors[6:]))
    assert factors[100] == 0.0
    assert learning_rate_factor(0, 1) == 1.0


def test_graphs_cannot_be_trained(base_folder, labelled_files, tmp_path):
    export(base_folder("bert"), tmp_path / "base", "fp32")
    with pytest.raises(BaseModelError, match="base model 'tiny' was exported: graphs cannot be trained"):
        train_adapter(arguments(labelled_files, tmp_path / "run"), load_base(str(tmp_path / "base")))
