"""The tokenizer of a base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from molex.backbone import BaseSpec


def load_tokenizer(base: str | Path, spec: BaseSpec) -> Any:
    """The tokenizer in a local folder or hub id, which gives token types only where the base has several."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.model_input_names = ["input_ids"] + ["token_type_ids"] * (spec.token_types > 1)
    return tokenizer
