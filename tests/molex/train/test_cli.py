"""`molex train` and `molex evaluate` as typed."""

import json

import pytest
import typer
from typer.testing import CliRunner

from molex.train.cli import evaluate, train
from tests.tiny import tiny_base

app = typer.Typer()
app.command()(train)
app.command()(evaluate)


def molex(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def encoder_base(tmp_path_factory):
    return tiny_base("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def decoder_base(tmp_path_factory):
    return tiny_base("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def classifier(encoder_base, labelled_files, tmp_path_factory):
    output = tmp_path_factory.mktemp("classifier") / "adapter"
    files = ("--train", labelled_files[0], "--eval", labelled_files[1])
    options = ("--learning-rate", "2e-2", "--batch-size", "16", "--gate-gradient", "none")
    result = molex("train", "--base", encoder_base, *files, "--output", output, *options)
    assert result.exit_code == 0, result.output
    return output


def test_training_leaves_an_adapter_and_a_record(classifier, labelled_files):
    names = {path.name for path in classifier.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "training.json"}
    record = json.loads((classifier / "training.json").read_text())
    assert record["arguments"]["gate_gradient"] == "none"
    assert record["arguments"]["mixed_depths"] == "all"
    assert record["data"]["train"]["file"] == labelled_files[0].name
    assert record["data"]["train"]["digest"].startswith("sha256:")
    assert len(record["epochs"]) == 3
    assert set(record["versions"]) == {"python", "torch", "transformers", "molex"}


def test_evaluate_reports_what_training_measured(encoder_base, classifier, labelled_files):
    where = ("--base", encoder_base, "--adapter", classifier, "--data", labelled_files[1])
    result = molex("evaluate", *where, "--json")
    assert result.exit_code == 0, result.output
    measured = json.loads(result.stdout)
    record = json.loads((classifier / "training.json").read_text())
    for name, value in measured["metrics"].items():
        assert value == pytest.approx(record["metrics"][name], abs=1e-5)
    assert measured["data"]["items"] == 32
    table = molex("evaluate", *where)
    assert "accuracy" in table.stdout


@pytest.mark.parametrize("method", ["molex", "lora"])
def test_a_regression_is_trained_and_evaluated(encoder_base, scored_files, tmp_path, method):
    files = ("--train", scored_files[0], "--eval", scored_files[1])
    options = ("--problem-type", "regression", "--learning-rate", "2e-2", "--batch-size", "16")
    output = tmp_path / "adapter"
    result = molex("train", "--base", encoder_base, *files, "--output", output, *options, "--method", method)
    assert result.exit_code == 0, result.output
    assert json.loads((output / "adapter_config.json").read_text())["problem_type"] == "regression"
    where = ("--base", encoder_base, "--adapter", output, "--data", scored_files[1])
    metrics = json.loads(molex("evaluate", *where, "--json").stdout)["metrics"]
    assert set(metrics) == {"loss", "pearson", "spearman"}
    # The variance of the scores is 3.1: a constant answer has that loss and no correlation.
    assert metrics["pearson"] > 0.8
    assert metrics["loss"] < 1.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--problem-type", "regression", "--metric", "accuracy"), "regression has pearson, spearman, loss"),
        (("--problem-type", "regression", "--task-type", "CAUSAL_LM"), "only used with --task-type SEQ_CLS"),
        (("--metric", "pearson"), "SEQ_CLS has accuracy"),
        ((), "train a regression with --problem-type regression"),
    ],
)
def test_options_of_a_regression_are_checked(encoder_base, scored_files, tmp_path, options, words):
    files = ("--train", scored_files[0], "--eval", scored_files[1], "--output", tmp_path / "adapter")
    result = molex("train", "--base", encoder_base, *files, *options)
    assert result.exit_code == 1
    assert words in " ".join(result.output.split())


def test_generation_is_trained_and_evaluated(decoder_base, prompt_files, tmp_path):
    files = ("--train", prompt_files[0], "--eval", prompt_files[1])
    options = ("--method", "lora", "--task-type", "CAUSAL_LM", "--epochs", "1", "--metric", "chrf")
    output = tmp_path / "adapter"
    result = molex("train", "--base", decoder_base, *files, "--output", output, *options)
    assert result.exit_code == 0, result.output
    where = ("--base", decoder_base, "--adapter", output, "--data", prompt_files[1])
    metrics = json.loads(molex("evaluate", *where, "--json").stdout)["metrics"]
    assert set(metrics) == {"loss", "perplexity", "bleu", "chrf"}
    short = molex("evaluate", *where, "--json", "--no-generate")
    assert set(json.loads(short.stdout)["metrics"]) == {"loss", "perplexity"}


def test_errors_are_one_line_without_traceback(encoder_base, labelled_files, tmp_path):
    files = ("--train", labelled_files[0], "--eval", labelled_files[1], "--output", tmp_path)
    result = molex("train", "--base", encoder_base, *files, "--method", "lora", "--alpha", "0.5")
    assert result.exit_code == 1
    assert result.stderr.strip() == "error: --alpha is only used with --method molex"


def test_a_finished_folder_is_not_overwritten(encoder_base, classifier, labelled_files):
    files = ("--train", labelled_files[0], "--eval", labelled_files[1], "--output", classifier)
    result = molex("train", "--base", encoder_base, *files)
    assert result.exit_code == 1
    assert "already holds an adapter" in result.stderr


def test_labels_of_the_data_must_be_the_adapters(encoder_base, classifier, tmp_path):
    data = tmp_path / "other.tsv"
    data.write_text("text\tlabel\nw1\tlukewarm\n")
    result = molex("evaluate", "--base", encoder_base, "--adapter", classifier, "--data", data)
    assert result.exit_code == 1
    assert "unknown label 'lukewarm' (known: cold, warm)" in result.stderr
