"""Tiny random base models and adapters of every family, made in milliseconds."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from molex.adapter import Adapter, assemble, new_adapter
from molex.backbone import BaseSpec
from molex.config import AdapterConfig, GateConfig, MolexConfig, ProblemType, VoteConfig
from molex.family import FAMILIES

ENCODERS = ("bert", "roberta")
DECODERS = ("gpt2", "llama", "mistral", "qwen2")
LAYERS, HIDDEN, VOCAB, POSITIONS = 5, 32, 97, 96

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
WORDS = SPECIAL + [f"w{i}" for i in range(VOCAB - 4)]
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
TARGETS = {"bert": ("query", "value"), "roberta": ("query", "value"), "gpt2": ("attn.c_attn", "c_fc")}


def tiny_base(
    model_type: str, folder: str | Path, seed: int = 0, *, characters: bool = False, **changes: Any
) -> Path:
    """Save a random base model of a family, with a tokenizer of words or characters; returns its folder.

    `changes` are fields of its config.
    """
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    loader: Any = AutoModelForCausalLM if FAMILIES[model_type].causal else AutoModel
    options = {"add_pooling_layer": False} if model_type == "roberta" else {}
    model = loader.from_config(_config(model_type, **changes), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder)
    (_character_tokenizer() if characters else _tokenizer()).save_pretrained(folder)
    return Path(folder)


def _config(model_type: str, **changes: Any) -> Any:
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if model_type == "gpt2":
        sizes |= {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": POSITIONS}
        return AutoConfig.for_model(model_type, **sizes | changes)
    sizes |= {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": POSITIONS}
    if model_type in DECODERS:
        sizes |= {"num_key_value_heads": 2}
    if model_type == "mistral":
        sizes |= {"sliding_window": 7}
    return AutoConfig.for_model(model_type, **sizes | changes)


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <eos> $B:1", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return _wrapped(tokenizer)


def _character_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each printable character of ASCII but ` and ~; GPT-2 spells a space as Ġ."""
    characters = [*string.printable[:95].replace("`", "").replace("~", "").replace(" ", "Ġ")]
    assert len(SPECIAL + characters) == VOCAB
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(SPECIAL + characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrapped(tokenizer)


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=POSITIONS,
        chat_template=CHAT_TEMPLATE,
    )


def molex_config(depths: Sequence[int] = range(LAYERS), **changes: Any) -> MolexConfig:
    """A mixture with a shared linear gate; `gate` and `vote` take keyword dictionaries."""
    gate = GateConfig(**changes.pop("gate", {}))
    vote = VoteConfig(**changes.pop("vote", {}))
    return MolexConfig(mixed_depths=tuple(depths), gate=gate, vote=vote, **changes)


def adapter_config(
    spec: BaseSpec,
    *,
    task: str = "SEQ_CLS",
    r: int = 4,
    molex: MolexConfig | None = None,
    problem_type: ProblemType = "single_label_classification",
) -> AdapterConfig:
    targets = TARGETS.get(spec.model_type, ("q_proj", "v_proj", "down_proj"))
    return AdapterConfig(
        task_type=task,
        r=r,
        lora_alpha=2.0 * r,
        target_modules=targets,
        fan_in_fan_out=spec.model_type == "gpt2",
        problem_type=problem_type,
        molex=molex,
    )


def random_adapter(
    spec: BaseSpec,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    num_labels: int = 3,
    mix: tuple[float, float] = (0.6, 0.4),
    **config: Any,
) -> Adapter:
    """An adapter of `adapter_config(spec, **config)` in which every weight matters."""
    fresh = new_adapter(spec, adapter_config(spec, **config), num_labels=num_labels, mix=mix, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in fresh.tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        value = tensor if name.startswith("molex.mix") else tensor + noise * (0.5 if "gate" in name else 0.2)
        tensors[name] = value.detach().to(torch.promote_types(dtype, torch.float32))
    return assemble(fresh.config, spec, tensors, digest=f"test:{seed}")


def relabel(adapter: Adapter, labels: Sequence[str]) -> Adapter:
    return replace(adapter, config=replace(adapter.config, id2label=dict(enumerate(labels))))


def random_ids(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB, (length,), generator=generator).tolist()
