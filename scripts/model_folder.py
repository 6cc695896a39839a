"""How every demo base folder is saved."""

import json
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

READABLE_BY_ALL = 0o644


def save_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Save both into `output`, readable by every user (safetensors files start out private)."""
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    # transformers 5 writes a class name that 4.x does not know; both know this one.
    set_field(output / "tokenizer_config.json", "tokenizer_class", "PreTrainedTokenizerFast")
    for path in output.iterdir():
        path.chmod(READABLE_BY_ALL)


def set_field(json_file: Path, field: str, value: str) -> None:
    """Overwrite one top-level field of a JSON file."""
    content = json.loads(json_file.read_text())
    content[field] = value
    json_file.write_text(json.dumps(content, indent=2) + "\n")
