"""Tokenization of datasets into ragged id lists.

Tokenizers are transformers' and tokenize here exactly as the server does, so that a gate is trained
on the tokens that will vote when it serves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from molex.train.data import DataError, Dataset, LabelledText, PromptText


@dataclass(frozen=True)
class Item:
    """One tokenized example.

    SEQ_CLS: all tokens vote and `label` is the class index, or the number of a regression. CAUSAL_LM:
    the first `prompt_length` tokens vote, and the loss is taken on all tokens after them.
    """

    token_ids: Sequence[int]
    token_type_ids: Sequence[int] | None = None
    label: int | float | None = None
    prompt_length: int | None = None


@dataclass(frozen=True)
class Encoded:
    """Tokenized examples and how many of them were cut to fit `max_length`."""

    items: tuple[Item, ...]
    truncated: int

    @property
    def num_tokens(self) -> int:
        """Tokens of all items together."""
        return sum(len(item.token_ids) for item in self.items)


def encode_labelled(
    tokenizer: Any, dataset: Dataset[LabelledText], labels: Sequence[float], max_length: int
) -> Encoded:
    """Tokenize classification or regression examples, pairs through the tokenizer's own template.

    Texts longer than `max_length` tokens are cut by the tokenizer's rule and counted.
    """
    items, truncated = [], 0
    for example, label in zip(dataset.examples, labels, strict=True):
        encoding = _encode(tokenizer, example)
        if len(encoding["input_ids"]) > max_length:
            encoding = _encode(tokenizer, example, truncation=True, max_length=max_length)
            truncated += 1
        items.append(Item(encoding["input_ids"], encoding.get("token_type_ids"), label=label))
    return Encoded(tuple(items), truncated)


def encode_prompts(tokenizer: Any, dataset: Dataset[PromptText], max_length: int) -> Encoded:
    """Tokenize generation examples: one item per completion, closed by the end-of-sequence token.

    Items longer than `max_length` lose the end of their completion and are counted.

    Raises:
        DataError: a prompt that leaves no room for a completion, or a tokenizer without an
            end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(f"{dataset.name}: the base's tokenizer has no end-of-sequence token")
    items, truncated = [], 0
    for index, example in enumerate(dataset.examples):
        prompt = encode_prompt(tokenizer, example.prompt)
        if not 0 < len(prompt) < max_length:
            raise DataError(
                f"{dataset.at(index, 'prompt')}: {len(prompt)} tokens; "
                f"it must have between 1 and {max_length - 1}"
            )
        for completion in example.completions:
            ids = _token_ids(tokenizer, completion, add_special_tokens=False)
            sequence = [*prompt, *ids, tokenizer.eos_token_id]
            truncated += len(sequence) > max_length
            items.append(Item(sequence[:max_length], prompt_length=len(prompt)))
    return Encoded(tuple(items), truncated)


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens of a prompt as a request brings them."""
    return _token_ids(tokenizer, prompt)


def _encode(tokenizer: Any, example: LabelledText, **options: Any) -> dict[str, list[int]]:
    encoding = tokenizer(example.text, example.text_pair, verbose=False, **options)
    return dict(encoding)


def _token_ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    ids = tokenizer(text, verbose=False, **options)["input_ids"]
    return list(ids)
