"""Options: defaults, and combinations that are refused by name."""

import re
from pathlib import Path

import pytest

from molex.config import GateConfig, VoteConfig
from molex.train.arguments import (
    ArgumentError,
    TrainArguments,
    adapter_config,
    as_json,
    complete,
    parse_depths,
)


def arguments(**options):
    paths = {"train": Path("t.tsv"), "eval": Path("e.tsv"), "output": Path("out")}
    return TrainArguments(base="tiny", **paths, **options)


def test_defaults_of_an_encoder(encoder):
    spec = encoder.model.spec
    completed = complete(arguments(), spec)
    config = adapter_config(completed, spec, ["no", "yes"])
    assert config.target_modules == ("query", "value")
    assert config.id2label == {0: "no", 1: "yes"}
    assert config.molex.mixed_depths == tuple(range(spec.num_layers))
    assert config.molex.gate == GateConfig()
    assert config.molex.vote == VoteConfig()
    assert (completed.metric, completed.max_length) == ("accuracy", spec.max_length)


def test_defaults_of_a_decoder(decoder):
    spec = decoder.model.spec
    completed = complete(arguments(task_type="CAUSAL_LM", method="lora"), spec)
    config = adapter_config(completed, spec, None)
    assert config.target_modules == ("q_proj", "v_proj")
    assert config.molex is None
    assert completed.metric == "perplexity"


def test_prompts_vote_in_generation(decoder):
    spec = decoder.model.spec
    completed = complete(arguments(task_type="CAUSAL_LM"), spec)
    assert adapter_config(completed, spec, None).molex.vote.over == "prompt"


def test_options_reach_the_configuration(encoder):
    spec = encoder.model.spec
    options = {
        "gate": "cosine",
        "gate_scope": "depth",
        "vote": "mean",
        "mixed_depths": "1,3-4",
        "top_k": 2,
        "mix": "learned",
        "gate_gradient": "none",
    }
    molex = adapter_config(complete(arguments(**options), spec), spec, ["a", "b"]).molex
    assert molex.gate == GateConfig("cosine", "depth", 64)
    assert molex.vote == VoteConfig("mean", "softmax")
    assert molex.mixed_depths == (1, 3, 4)
    assert (molex.top_k, molex.mix, molex.gate_gradient) == (2, "learned", "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lora", "alpha": 0.9}, "--alpha is only used with --method molex"),
        ({"method": "lora", "gate": "linear"}, "--gate is only used with --method molex"),
        ({"method": "lora", "balance_coefficient": 0.0}, "--balance-coefficient is only used"),
        ({"projection_dim": 8}, "--projection-dim is only used with --gate cosine"),
        ({"vote_score": "softmax"}, "--vote-score is only used with --vote mean"),
        ({"alpha": 1.0}, "--alpha must be between 0 and 1"),
        ({"learning_rate": 0.0}, "--learning-rate must be above 0"),
        ({"lora_alpha": -1.0}, "--lora-alpha must be above 0"),
        ({"lora_dropout": 1.0}, "--lora-dropout must be at least 0 and below 1"),
        ({"metric": "bleu"}, "--metric bleu: SEQ_CLS has accuracy, matthews"),
        ({"task_type": "CAUSAL_LM"}, "a roberta base does not generate"),
        ({"max_length": 1000}, "--max-length 1000: the base takes at most"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(encoder, options, message):
    with pytest.raises(ArgumentError, match=re.escape(message)):
        complete(arguments(**options), encoder.model.spec)


@pytest.mark.parametrize(
    ("text", "depths"),
    [("all", (0, 1, 2, 3, 4)), ("0-2", (0, 1, 2)), ("4,0, 2", (0, 2, 4)), ("0-1,1-3", (0, 1, 2, 3))],
)
def test_depths(text, depths):
    assert parse_depths(text, 5) == depths


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "0,,1", "3-1", "5", "0-9"])
def test_bad_depths_are_refused(text):
    with pytest.raises(ArgumentError, match=re.escape(f"--mixed-depths {text!r}")):
        parse_depths(text, 5)


def test_records_name_no_folder_of_this_machine(tmp_path):
    paths = {"train": tmp_path / "t.tsv", "eval": tmp_path / "e.tsv", "output": tmp_path / "o"}
    record = as_json(TrainArguments(base=str(tmp_path), **paths))
    assert str(tmp_path.parent) not in str(record)
    assert record["train"] == "t.tsv"
    assert as_json(TrainArguments(base="some/hub-id", **paths))["base"] == "some/hub-id"
