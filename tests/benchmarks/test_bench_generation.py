"""Adapters, prompts and counting of the generation benchmark; its contestants need models and peers."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_generation
from benchmarks.bench_generation import available, figures
from benchmarks.generation_arms import (
    Workload,
    check_count,
    generated_tokens,
    over_http,
    transformers_contestant,
    write_adapters,
)
from molex import MolexModel, read_adapter
from tests.loadtests.stub import Stub, running
from tests.tiny import LAYERS

# PEFT asks transformers in words that transformers no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

USAGE = 'data: {"choices": [], "usage": {"completion_tokens": 7}}'
DONE = "data: [DONE]"
RATES = {
    "ours LoRA float32": 100.0,
    "ours LoRA bfloat16": 300.0,
    "ours MoLEx bfloat16": 200.0,
    "ours one stream float32": 20.0,
    "ours one stream bfloat16": 30.0,
}


@pytest.fixture(scope="module")
def base(base_folder):
    return base_folder("llama")


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    write_adapters(base, folder, 2)
    return folder


def test_adapters_of_both_kinds_share_their_factors(base, adapters):
    assert sorted(path.name for path in adapters.glob("*/")) == ["lora-0", "lora-1", "molex-0", "molex-1"]
    spec = MolexModel.from_pretrained(base).spec
    for number in range(2):
        lora, molex = (read_adapter(adapters / f"{kind}-{number}", spec) for kind in ("lora", "molex"))
        assert set(molex.gates) == set(range(LAYERS))
        assert all(torch.equal(molex.tensors[name], tensor) for name, tensor in lora.tensors.items())


def test_transformers_makes_as_many_tokens_as_asked_for(base, adapters):
    load = Workload([[5, 6, 7], [8]], [1, 0], tokens=4)
    transformers_contestant(base, adapters, "float32", load)()


def test_a_workload_names_its_adapters():
    load = Workload([[1], [2], [3]], [0, 1, 0], tokens=5)
    assert (load.names("molex"), load.total_tokens) == (["molex-0", "molex-1", "molex-0"], 15)
    assert load.first_alone() == Workload([[1]], [0], tokens=5)


def test_tokens_are_counted_by_the_server():
    assert generated_tokens([USAGE, DONE]) == 7


@pytest.mark.parametrize(
    "lines",
    [[], [DONE], [USAGE], ['data: {"choices": []}', DONE], ['{"error": 1}', DONE], [USAGE, USAGE]],
    ids=["nothing", "end only", "no end", "no usage", "error", "cut"],
)
def test_a_stream_without_a_count(lines):
    with pytest.raises(ValueError, match="the stream"):
        generated_tokens(lines)


def test_a_contestant_that_stops_early_is_no_contestant():
    with pytest.raises(ValueError, match="lora-0 made 3 tokens where 4 were asked for"):
        check_count("lora-0", 3, 4)


def test_every_prompt_is_a_request_of_its_own():
    stub = Stub()
    load = Workload([[1, 2], [3]], [0, 1], tokens=4)
    with running(stub) as url, pytest.raises(ValueError, match="no usage"):
        over_http(url, load, "lora")()
    asked = {body["model"]: (body["prompt"], body["max_tokens"], body["ignore_eos"]) for body in stub.bodies}
    assert asked == {"lora-0": ([1, 2], 4, True), "lora-1": ([3], 4, True)}


def test_figures_compare_each_at_its_best():
    vllm = {"vllm LoRA float32": 40.0, "vllm LoRA bfloat16 all cores": 50.0}
    rounded = {"ours LoRA int8, routed int4": 400.0}
    lora, lora_unrounded, molex, _ = figures(RATES | rounded | vllm)
    assert (lora.key, lora.value, lora.bound, lora.held) == ("P6", 8.0, 5.0, True)
    assert (lora_unrounded.key, lora_unrounded.value, lora_unrounded.bound) == ("P6", 6.0, None)
    assert (molex.key, molex.value, molex.held) == ("P6", 4.0, True)
    assert molex.measured == {"ours MoLEx bfloat16": 200.0} | vllm


def test_figures_compare_llama_at_equal_width():
    many = {"llama LoRA f32": 60.0, "llama LoRA f16": 80.0, "llama LoRA bf16": 100.0}
    alone = {"llama one stream f32": 40.0, "llama one stream f16": 30.0, "llama one stream bf16": 20.0}
    compared = {figure.what: (figure.value, figure.held) for figure in figures(RATES | many | alone)}
    assert list(compared.values()) == [
        (pytest.approx(100 / 60), False),
        (0.5, False),
        (3.0, True),
        (1.0, True),
    ]
    assert all("llama.cpp" in what for what in compared)


def test_a_peer_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(bench_generation, "is_installed", lambda name: name == "llama")
    assert available(["vllm", "transformers", "llama"]) == ["transformers", "llama"]
    assert "vllm: skipped" in capsys.readouterr().out
