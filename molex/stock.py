"""Models of transformers, loaded and checked."""

from __future__ import annotations

from copy import deepcopy
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from molex.errors import BaseModelError
from molex.exported import is_exported
from molex.family import FAMILIES


def load_stock(base: str | Path, dtype: torch.dtype | Literal["auto"]) -> tuple[PreTrainedModel, bool]:
    """transformers' model of a local folder or hub id, and whether it is a BERT with a trained pooler.

    `auto` is the precision that it is saved in. Raises BaseModelError, naming the base, if it can't be
    served.
    """
    if is_exported(base):
        raise BaseModelError(f"base model {str(base)!r}: it was exported: it has no weights but in graphs")
    return _load(base, _config(base), dtype)


def load_around_layers(base: Path) -> tuple[PreTrainedModel, bool]:
    """The same of an exported base in float32, whose layers have shapes and no weights."""
    config = _config(base)
    without_layers = deepcopy(config)
    without_layers.num_hidden_layers = 0
    model, has_pooler = _load(base, without_layers, torch.float32)
    family = FAMILIES[config.model_type]
    with torch.device("meta"):
        whole = _loader(config).from_config(config)
    model.base_model.set_submodule(family.layers, attrgetter(family.layers)(whole.base_model))
    model.config = model.base_model.config = config
    return model, has_pooler


def _config(base: str | Path) -> Any:
    is_path = isinstance(base, Path) or base.startswith((".", "/"))
    if is_path and not Path(base).is_dir():
        raise BaseModelError(f"base model {str(base)!r}: no such folder")
    try:
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise BaseModelError(f"base model {str(base)!r}: {error}") from error
    _check_supported(str(base), config)
    return config


def _loader(config: Any) -> Any:
    return AutoModelForCausalLM if FAMILIES[config.model_type].causal else AutoModel


def _load(
    base: str | Path, config: Any, dtype: torch.dtype | Literal["auto"]
) -> tuple[PreTrainedModel, bool]:
    options: dict[str, Any] = {"config": config, "dtype": dtype}
    if config.model_type == "roberta":
        options["add_pooling_layer"] = False
    try:
        model, info = _loader(config).from_pretrained(base, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BaseModelError(f"base model {str(base)!r}: {error}") from error
    missing = {key for key in info["missing_keys"] if "pooler" not in key}
    if missing:
        raise BaseModelError(f"base model {str(base)!r}: no weights for {sorted(missing)[0]}")
    has_pooler = config.model_type == "bert" and not info["missing_keys"]
    return model, has_pooler


def _check_supported(base: str, config: PretrainedConfig) -> None:
    if config.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise BaseModelError(f"base model {base!r}: model_type {config.model_type!r} is not one of {known}")
    for switch in ("is_decoder", "add_cross_attention"):
        if not FAMILIES[config.model_type].causal and getattr(config, switch, False):
            raise BaseModelError(f"base model {base!r}: {switch} is not supported for {config.model_type}")
    if getattr(config, "position_embedding_type", "absolute") != "absolute":
        raise BaseModelError(f"base model {base!r}: relative position embeddings are not supported")
    if getattr(config, "reorder_and_upcast_attn", False):
        raise BaseModelError(f"base model {base!r}: reorder_and_upcast_attn is not supported")
    if FAMILIES[config.model_type].rotary:
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        if kv_heads < 1 or heads % kv_heads:
            raise BaseModelError(
                f"base model {base!r}: {heads} query heads cannot share {kv_heads} key heads evenly"
            )
