"""How the model families of transformers are put together.

A layer is what comes before attention, a norm and linear layers, and what comes after it, a function over the
modules of a stock block. Between the two is attention, which has no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from molex.heads import HeadKind


@dataclass(frozen=True)
class Family:
    """How one model family of transformers is put together.

    `root` is the base model's attribute inside a task model, as PEFT's tensor names spell it, `layers` the
    path from there to the list of blocks, `attention` the path from a block to its attention; `projections`
    are the linear layers of a block that make queries, keys and values, `norm_before` the norm before them;
    `finish` maps a block, its input and what attention returned to the block's output, with the linear layers
    `join` after attention, `up` (two where one gates the other) and `down`, and the block's two `norms`;
    `activation` is where the config names the function between `up` and `down`; `norm` is the norm
    after the last block; `rotary` says whether queries and keys are rotated; `max_length` is the longest
    sequence that the position table takes.
    """

    root: str
    layers: str
    attention: str
    head: HeadKind
    embed: Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]
    projections: tuple[str, ...]
    join: str
    up: tuple[str, ...]
    down: str
    norms: tuple[str, str]
    finish: Callable[[Any, Tensor, Tensor], Tensor]
    max_length: Callable[[Any], int]
    causal: bool = True
    norm_before: str | None = None
    norm: str | None = None
    activation: str = "hidden_act"
    rotary: bool = False


def _embed_bert(base: Any, tokens: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
    types = torch.zeros_like(tokens) if types is None else types
    return base.embeddings(input_ids=tokens, position_ids=positions, token_type_ids=types)  # type: ignore[no-any-return]


def _embed_roberta(base: Any, tokens: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
    return _embed_bert(base, tokens, positions + base.config.pad_token_id + 1, types)


def _embed_gpt2(base: Any, tokens: Tensor, positions: Tensor, _types: Tensor | None) -> Tensor:
    return base.wte(tokens) + base.wpe(positions)  # type: ignore[no-any-return]


def _embed_llama(base: Any, tokens: Tensor, _positions: Tensor, _types: Tensor | None) -> Tensor:
    return base.embed_tokens(tokens)  # type: ignore[no-any-return]


def _finish_bert(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    # The block's own modules of the two halves only add dropout, which is off, and calls.
    after, widen, narrow = block.attention.output, block.intermediate, block.output
    x = after.LayerNorm(after.dense(attended) + x)
    wide = widen.intermediate_act_fn(widen.dense(x))
    return narrow.LayerNorm(narrow.dense(wide) + x)  # type: ignore[no-any-return]


def _finish_gpt2(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    x = x + block.attn.c_proj(attended)
    return x + block.mlp(block.ln_2(x))  # type: ignore[no-any-return]


def _finish_llama(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    x = x + block.self_attn.o_proj(attended)
    return x + block.mlp(block.post_attention_layernorm(x))  # type: ignore[no-any-return]


_BERT = Family(
    root="bert",
    layers="encoder.layer",
    attention="attention.self",
    head="bert",
    embed=_embed_bert,
    projections=("attention.self.query", "attention.self.key", "attention.self.value"),
    join="attention.output.dense",
    up=("intermediate.dense",),
    down="output.dense",
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    finish=_finish_bert,
    max_length=attrgetter("max_position_embeddings"),
    causal=False,
)
_LLAMA = Family(
    root="model",
    layers="layers",
    attention="self_attn",
    head="score",
    embed=_embed_llama,
    projections=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    join="self_attn.o_proj",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    norms=("input_layernorm", "post_attention_layernorm"),
    finish=_finish_llama,
    max_length=attrgetter("max_position_embeddings"),
    norm_before="input_layernorm",
    norm="norm",
    rotary=True,
)
FAMILIES: Mapping[str, Family] = {
    "bert": _BERT,
    "roberta": replace(
        _BERT,
        root="roberta",
        head="roberta",
        embed=_embed_roberta,
        # Positions start behind the padding index.
        max_length=lambda config: config.max_position_embeddings - config.pad_token_id - 1,
    ),
    "gpt2": Family(
        root="transformer",
        layers="h",
        attention="attn",
        head="score",
        embed=_embed_gpt2,
        projections=("attn.c_attn",),
        join="attn.c_proj",
        up=("mlp.c_fc",),
        down="mlp.c_proj",
        norms=("ln_1", "ln_2"),
        finish=_finish_gpt2,
        max_length=attrgetter("max_position_embeddings"),
        norm_before="ln_1",
        norm="ln_f",
        activation="activation_function",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
}


def attention_options(block: Any, family: Family, config: Any) -> tuple[float, int | None]:
    """What a block's attention multiplies scores by, and how many tokens back it sees (None: all).

    Qwen2 sets the window for each layer, Mistral for all.
    """
    attention = attrgetter(family.attention)(block)
    everywhere = config.sliding_window if config.model_type == "mistral" else None
    return attention.scaling, getattr(attention, "sliding_window", None) or everywhere
