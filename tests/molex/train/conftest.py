"""Tiny bases and tiny data sets that an adapter can learn in seconds."""

import json
import random

import pytest

from molex.train.recipe import load_base
from tests.tiny import tiny_base


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    return load_base(str(tiny_base("roberta", tmp_path_factory.mktemp("encoder"))))


@pytest.fixture(scope="session")
def decoder(tmp_path_factory):
    return load_base(str(tiny_base("llama", tmp_path_factory.mktemp("decoder"))))


@pytest.fixture(scope="session")
def labelled_files(tmp_path_factory):
    """Two classes told apart by their words: (train, eval)."""
    folder = tmp_path_factory.mktemp("labelled")
    rng = random.Random(0)
    for name, rows in (("train.tsv", 96), ("eval.tsv", 32)):
        lines = ["text\tlabel"]
        for row in range(rows):
            label, words = (("cold", range(4)), ("warm", range(40, 44)))[row % 2]
            text = " ".join(f"w{rng.choice(words)}" for _ in range(rng.randint(2, 9)))
            lines.append(f"{text}\t{label}")
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder / "train.tsv", folder / "eval.tsv"


@pytest.fixture(scope="session")
def scored_files(tmp_path_factory):
    """Pairs scored from 0 to 5 by the share of warm words in the first text: (train, eval)."""
    folder = tmp_path_factory.mktemp("scored")
    rng = random.Random(0)
    for name, rows in (("train.tsv", 128), ("eval.tsv", 48)):
        lines = ["text\ttext_pair\tlabel"]
        for _ in range(rows):
            warm = rng.randint(0, 4)
            words = [f"w{rng.randrange(40, 44)}"] * warm + [f"w{rng.randrange(4)}"] * (4 - warm)
            lines.append(f"{' '.join(words)}\tw60\t{1.25 * warm}")
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder / "train.tsv", folder / "eval.tsv"


@pytest.fixture(scope="session")
def prompt_files(tmp_path_factory):
    """Completions that follow from the first word of the prompt: (train, eval with references)."""
    folder = tmp_path_factory.mktemp("prompts")
    rng = random.Random(0)
    train = [_prompt(rng) for _ in range(96)]
    lines = [json.dumps({"prompt": prompt, "completion": text}) for prompt, text in train]
    (folder / "train.jsonl").write_text("\n".join(lines))
    evaluation = [_prompt(rng) for _ in range(8)]
    lines = [json.dumps({"prompt": p, "references": [t, "w9 w9"]}) for p, t in evaluation[:4]]
    lines += [json.dumps({"prompt": p, "references": [t]}) for p, t in evaluation[4:]]
    (folder / "eval.jsonl").write_text("\n".join(lines))
    return folder / "train.jsonl", folder / "eval.jsonl"


def _prompt(rng):
    key = rng.randrange(3)
    noise = " ".join(f"w{rng.randrange(50, 54)}" for _ in range(rng.randint(1, 2)))
    return f"w{key} {noise}", f"w{10 + key} w{20 + key} w{30 + key} w{40 + key}"
