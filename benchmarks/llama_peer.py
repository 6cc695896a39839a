"""llama.cpp as a contestant of bench_generation; runs in the environment .peers/llama.

    .peers/llama/bin/python benchmarks/llama_peer.py BASE ADAPTERS SCRATCH f16

It writes the base and the LoRA adapters of a folder as GGUF files to SCRATCH, loads them and prints a line.
Then it answers every line of its standard input, a workload in JSON, with one of its own: the tokens that it
generated for each prompt. An adapter is a setting of the whole context, so only requests with the same one
share a batch, and the adapters take turns.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp  # type: ignore[import-not-found]
import numpy as np
from safetensors.numpy import load_file

MAX_TOKENS = 512
"""Of one sequence, prompt included."""
WEIGHTS = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
}


# Files


def permuted(rows: Any, num_heads: int) -> Any:
    """Rows of q_proj or k_proj, in the order of llama.cpp's rotary embedding: pairs, instead of halves."""
    halves = rows.reshape(num_heads, 2, -1, rows.shape[-1])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def convert_base(folder: Path, output: Path, kind: str) -> None:
    """Write the weights of a Llama folder, without its tokenizer; vectors stay in 32 bits, as usual."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(output, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if num_heads := heads.get(module.rpartition(".")[2]):
            tensor = permuted(tensor, num_heads)
        weights = WEIGHTS[kind] if tensor.ndim > 1 else WEIGHTS["f32"]
        packed = gguf.quantize(tensor.astype(np.float32), weights)
        writer.add_tensor(f"{names.get_name(module)}.weight", packed, raw_dtype=weights)
    write(writer)


def convert_adapter(folder: Path, output: Path, num_layers: int, num_heads: int) -> None:
    """Write a PEFT folder. `num_heads`: of the queries of the base."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(output, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", config["lora_alpha"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, num_layers)
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, _, factor = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        if module.endswith("q_proj") and factor == "lora_B":
            tensor = permuted(tensor, num_heads)
        writer.add_tensor(f"{names.get_name(module)}.weight.{factor.lower()}", np.ascontiguousarray(tensor))
    write(writer)


def write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Generation


class Generator:
    """A base, its adapters, and one context for up to `num_sequences` sequences at a time."""

    def __init__(self, base: Path, adapters: Sequence[Path], num_sequences: int) -> None:
        model_params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(base), model_params)
        self.adapters = [
            llama_cpp.llama_adapter_lora_init(self.model, os.fsencode(path)) for path in adapters
        ]
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = MAX_TOKENS * num_sequences, num_sequences
        params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not (self.model and all(self.adapters) and self.context):
            raise RuntimeError(f"llama.cpp does not load {base} with {len(adapters)} adapters")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def run(self, adapter: int, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """Continue prompts greedily by `tokens` tokens each, all in one batch, with one adapter."""
        chosen = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(self.adapters[adapter])
        llama_cpp.llama_set_adapters_lora(self.context, chosen, 1, (ctypes.c_float * 1)(1.0))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
        generated: list[list[int]] = [[] for _ in prompts]
        pending = [list(prompt) for prompt in prompts]
        starts = [0] * len(prompts)
        for _ in range(tokens):
            newest = self.step(pending, starts)
            starts = [start + len(ids) for start, ids in zip(starts, pending, strict=True)]
            pending = [[token] for token in newest]
            for sequence, token in zip(generated, newest, strict=True):
                sequence.append(token)
        return generated

    def step(self, pending: Sequence[Sequence[int]], starts: Sequence[int]) -> list[int]:
        """The next token of each sequence, after its pending tokens, which stand at `start` and on."""
        batch = llama_cpp.llama_batch_init(sum(map(len, pending)), 0, 1)
        lasts = []
        for number, (ids, start) in enumerate(zip(pending, starts, strict=True)):
            for offset, token in enumerate(ids):
                at = batch.n_tokens
                batch.token[at], batch.pos[at] = token, start + offset
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, number
                batch.logits[at] = offset == len(ids) - 1
                batch.n_tokens += 1
            lasts.append(batch.n_tokens - 1)
        status = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        return [self.best(last) for last in lasts]

    def best(self, position: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, position)
        return int(np.argmax(np.ctypeslib.as_array(logits, shape=(self.vocabulary,))))


def answer(generator: Generator, load: dict[str, Any]) -> Iterator[tuple[int, list[int]]]:
    """Index and generated tokens of each prompt of a workload, adapter by adapter."""
    for adapter in dict.fromkeys(load["adapters"]):
        indices = [n for n, chosen in enumerate(load["adapters"]) if chosen == adapter]
        prompts = [load["prompts"][n] for n in indices]
        yield from zip(indices, generator.run(adapter, prompts, load["tokens"]), strict=True)


def main() -> None:
    base, adapters, scratch = map(Path, sys.argv[1:4])
    kind = sys.argv[4]
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    convert_base(base, scratch / f"base-{kind}.gguf", kind)
    folders = sorted(adapters.glob("lora-*"), key=lambda folder: int(folder.name.removeprefix("lora-")))
    files = [scratch / f"{folder.name}-{kind}.gguf" for folder in folders]
    for folder, file in zip(folders, files, strict=True):
        convert_adapter(folder, file, config["num_hidden_layers"], config["num_attention_heads"])
    generator = Generator(scratch / f"base-{kind}.gguf", files, num_sequences=16)
    print("ready", flush=True)
    for line in sys.stdin:
        texts = dict(answer(generator, json.loads(line)))
        print(json.dumps([texts[n] for n in sorted(texts)]), flush=True)


if __name__ == "__main__":
    main()
