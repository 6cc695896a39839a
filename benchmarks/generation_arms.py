"""The contestants of bench_generation: one workload, run by our server, by vLLM's and without one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks.common import DTYPES, Contestant, mixing_everywhere
from benchmarks.peers import answering, free_port, peer_python, running
from molex import MolexModel, read_adapter, write_adapter
from molex.adapter import assemble, new_adapter

RANK = 8
START_SECONDS = 600
ANSWER_SECONDS = 600
PAD = 0


@dataclass(frozen=True)
class Workload:
    """What every contestant generates: `tokens` tokens after each prompt, greedily, all at the same time.

    `prompts`: token ids; `adapters`: for each prompt the number of its adapter.
    """

    prompts: Sequence[Sequence[int]]
    adapters: Sequence[int]
    tokens: int

    @property
    def total_tokens(self) -> int:
        return self.tokens * len(self.prompts)

    def names(self, kind: str) -> list[str]:
        """The adapter folder of each prompt; `kind` is `lora` or `molex`."""
        return [f"{kind}-{number}" for number in self.adapters]

    def first_alone(self) -> Workload:
        return replace(self, prompts=self.prompts[:1], adapters=self.adapters[:1])


def write_adapters(base: Path, folder: Path, count: int) -> None:
    """Write `count` random adapters on queries and values: `lora-N`, and `molex-N` with the same factors.

    The LoRA folders are PEFT's own. Those of MoLEx add a random gate that mixes at every depth.
    """
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora, adapter_name="lora-0")
    for number in range(1, count):
        model.add_adapter(f"lora-{number}", lora)
    model.save_pretrained(folder)
    spec = MolexModel.from_pretrained(base).spec
    for number in range(count):
        adapter = read_adapter(folder / f"lora-{number}", spec)
        config = replace(adapter.config, molex=mixing_everywhere(spec))
        gates = new_adapter(spec, config, seed=number).tensors
        write_adapter(assemble(config, spec, {**gates, **adapter.tensors}), folder / f"molex-{number}")


# Servers, over HTTP


def vllm_server(
    base: Path, adapters: Path, dtype: str, reserved_cores: int, log: Path
) -> AbstractContextManager[str]:
    """vLLM's server, with the LoRA adapters of a folder; yields its URL. Raises PeerError.

    `reserved_cores`: how many cores its model leaves to its HTTP process.
    """
    port, folders = free_port(), sorted(adapters.glob("lora-*"))
    command = [str(peer_python("vllm")), "-m", "vllm.entrypoints.openai.api_server", "--model", str(base)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--enforce-eager"]
    command += ["--max-model-len", "2048", "--enable-lora", "--max-lora-rank", str(RANK)]
    command += ["--max-loras", str(len(folders)), "--lora-modules"]
    command += [f"{folder.name}={folder}" for folder in folders]
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment["VLLM_CPU_NUM_OF_RESERVED_CPU"] = str(reserved_cores)
    return running(command, f"http://127.0.0.1:{port}", "/health", START_SECONDS, log, environment)


def over_http(url: str, load: Workload, kind: str) -> Contestant:
    """Streams the workload from a server that speaks OpenAI's completions, each prompt in its own request.

    The client is the standard library's: it shares the cores with the server, and a heavier one would be
    measured too.
    """

    def ask(name: str, prompt: Sequence[int]) -> None:
        body: dict[str, Any] = {"model": name, "prompt": prompt, "max_tokens": load.tokens, "temperature": 0}
        body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        with closing(HTTPConnection(urlsplit(url).netloc, timeout=ANSWER_SECONDS)) as connection:
            headers = {"content-type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            answer = connection.getresponse().read().decode()
        lines = [line for line in answer.split("\n") if line]
        check_count(name, generated_tokens(lines), load.tokens)

    def ask_all() -> None:
        with ThreadPoolExecutor(len(load.prompts)) as pool:
            list(pool.map(ask, load.names(kind), load.prompts))

    return ask_all


def generated_tokens(lines: Sequence[str]) -> int:
    """The number of tokens that a stream of OpenAI's completions says it had, in the event before its end.

    Raises ValueError with the end of the answer where it does not say so.
    """
    try:
        event, end = lines[-2:]
        count: int = json.loads(event.removeprefix("data: "))["usage"]["completion_tokens"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"the stream gives no usage: {lines[-2:]}") from None
    if end != "data: [DONE]":
        raise ValueError(f"the stream broke off: {lines[-2:]}")
    return count


def check_count(name: str, generated: int, asked: int) -> None:
    """Tokens a second are no measure where a contestant stops early. Raises ValueError."""
    if generated != asked:
        raise ValueError(f"{name} made {generated} tokens where {asked} were asked for")


# In this process


def transformers_contestant(base: Path, adapters: Path, dtype: str, load: Workload) -> Contestant:
    """`generate` of transformers on one padded batch, with PEFT's mixed adapters."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=DTYPES[dtype])
    names = load.names("lora")
    first, *others = dict.fromkeys(names)
    options = {"autocast_adapter_dtype": False}
    model = PeftModel.from_pretrained(plain, adapters / first, adapter_name=first, **options)
    for name in others:
        model.load_adapter(adapters / name, adapter_name=name, **options)
    model.eval()
    longest = max(map(len, load.prompts))
    padded = torch.tensor([[PAD] * (longest - len(ids)) + list(ids) for ids in load.prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in load.prompts])
    config = GenerationConfig(
        max_new_tokens=load.tokens, do_sample=False, eos_token_id=None, pad_token_id=PAD
    )

    def run() -> None:
        with torch.inference_mode():
            ids = model.generate(
                input_ids=padded, attention_mask=mask, generation_config=config, adapter_names=names
            )
        check_count(f"transformers {dtype}", ids.shape[1] - longest, load.tokens)

    return run


# llama.cpp, a process of its own


@contextmanager
def llama_contestants(
    base: Path, adapters: Path, weights: str, loads: Sequence[Workload], scratch: Path, log: Path
) -> Iterator[list[Contestant]]:
    """One contestant for each workload, all on one model in `f32`, `f16` or `bf16`. Raises PeerError."""
    program = str(Path(__file__).with_name("llama_peer.py"))
    command = [str(peer_python("llama")), program, *map(str, (base, adapters, scratch)), weights]
    with answering(command, log) as ask:
        yield [partial(_ask_llama, ask, load) for load in loads]


def _ask_llama(ask: Callable[[str], str], load: Workload) -> None:
    for generated in json.loads(ask(json.dumps(asdict(load)))):
        check_count("llama", len(generated), load.tokens)
