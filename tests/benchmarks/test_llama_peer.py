"""llama.cpp generates what this engine does, from the files that the benchmark makes for it."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import generation_arms
from benchmarks.generation_arms import Workload, write_adapters
from benchmarks.peers import peer_python
from molex import MolexModel, read_adapter
from molex.generate import generate
from molex.sampling import SamplingParams
from scripts.install_peers import is_installed
from tests.tiny import random_ids

pytestmark = [
    pytest.mark.skipif(not is_installed("llama"), reason="llama.cpp is not installed; `make peers`"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
PROGRAM = Path(generation_arms.__file__).with_name("llama_peer.py")


def test_llama_generates_the_same_tokens(base_folder, tmp_path):
    base, adapters, scratch = base_folder("llama"), tmp_path / "adapters", tmp_path / "gguf"
    scratch.mkdir()
    write_adapters(base, adapters, 2)
    load = Workload(
        [random_ids(5, seed=1), random_ids(9, seed=2), random_ids(2, seed=3)], [0, 1, 0], tokens=6
    )
    command = [peer_python("llama"), PROGRAM, base, adapters, scratch, "f32"]
    request = json.dumps(asdict(load)) + "\n"
    done = subprocess.run(command, input=request, capture_output=True, text=True, check=True)
    model = MolexModel.from_pretrained(base)
    params = SamplingParams(max_tokens=load.tokens, temperature=0)
    expected = [
        generate(model, [prompt], read_adapter(adapters / name, model.spec), params)[0]
        for prompt, name in zip(load.prompts, load.names("lora"), strict=True)
    ]
    ready, answer = done.stdout.splitlines()
    assert (ready, json.loads(answer)) == ("ready", expected)
