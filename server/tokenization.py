"""Text to tokens and back, for one base. Safe to call from several threads."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import GenerationConfig

from molex.backbone import BaseSpec
from molex.tokenizer import load_tokenizer
from server.errors import ErrorKind, ServiceError
from server.grammar import GrammarCompiler

TextOrPair = str | list[str]
"""One text, or two that the tokenizer joins by its own template."""


@dataclass(frozen=True)
class Prompt:
    """The tokens of one input."""

    token_ids: list[int]
    token_type_ids: list[int] | None = None


class Tokenization:
    """A base's tokenizer with the limits of its requests.

    `stop_ids` are the tokens that end a generation: the tokenizer's end of sequence and those of the base's
    generation config.
    """

    def __init__(self, tokenizer: Any, *, max_length: int, vocab_size: int, stop_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self.max_length = max_length
        self.stop_ids = stop_ids
        # A tokenizer file may switch truncation on. The first call switches it off, which must not
        # happen while another thread uses the tokenizer.
        tokenizer("a")

    @classmethod
    def from_pretrained(cls, source: str, spec: BaseSpec, *, max_length: int) -> Tokenization:
        """Load the tokenizer of a local folder or hub id."""
        tokenizer = load_tokenizer(source, spec)
        stop_ids = frozenset(_stop_ids(tokenizer, source))
        max_length = min(max_length, spec.max_length)
        return cls(tokenizer, max_length=max_length, vocab_size=spec.vocab_size, stop_ids=stop_ids)

    def encode(
        self, inputs: Sequence[TextOrPair], param: str, *, reserve: int = 0, truncate: bool = False
    ) -> list[Prompt]:
        """Tokenize texts or pairs, leaving room for `reserve` more tokens.

        With `truncate` what is too long loses its end; of a pair, the longer text does. Raises ServiceError
        naming the input that is empty or too long.
        """
        prompts = [self._encode(text, truncate=truncate) for text in inputs]
        for index, prompt in enumerate(prompts):
            name = param if len(prompts) == 1 else f"{param}.{index}"
            self.check(prompt.token_ids, name, reserve=reserve)
        return prompts

    def encode_chat(self, messages: Sequence[Mapping[str, str]], *, reserve: int, **options: bool) -> Prompt:
        """Tokenize a conversation with the tokenizer's chat template; `options` are those of `chat_ids`.

        Raises ServiceError where there is no template, or where it refuses the conversation.
        """
        prompt = Prompt(self.chat_ids(messages, **options))
        self.check(prompt.token_ids, "messages", reserve=reserve)
        return prompt

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Tokens of a conversation, however many. Raises ServiceError as `encode_chat` does."""
        if not self._tokenizer.chat_template:
            raise ServiceError(
                ErrorKind.INVALID_REQUEST,
                "this base's tokenizer has no chat template; use /v1/completions",
                param="model",
            )
        try:
            encoding = self._tokenizer.apply_chat_template(
                list(messages),
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                return_dict=True,
            )
        except (TemplateError, ValueError) as error:
            message = f"the chat template refuses these messages: {error}"
            raise ServiceError(ErrorKind.INVALID_REQUEST, message, param="messages") from error
        return list(encoding["input_ids"])

    def token_ids(self, text: str, *, special: bool) -> list[int]:
        """Tokens of a text, however many, with or without what the tokenizer adds."""
        return list(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def token_names(self, token_ids: Sequence[int]) -> list[str]:
        """Tokens as the vocabulary spells them."""
        return list(self._tokenizer.convert_ids_to_tokens(list(token_ids)))

    def check(self, token_ids: Sequence[int], param: str, *, reserve: int = 0) -> None:
        """Raises ServiceError where tokens are none, out of range or too many."""
        if not token_ids:
            raise ServiceError(ErrorKind.EMPTY_INPUT, f"{param} has no tokens", param=param)
        self.check_vocabulary(token_ids, param)
        if len(token_ids) + reserve > self.max_length:
            wanted = f" and asks for {reserve} more" if reserve else ""
            raise ServiceError(
                ErrorKind.CONTEXT_LENGTH,
                f"{param} has {len(token_ids)} tokens{wanted}; the limit is {self.max_length}",
                param=param,
            )

    def check_vocabulary(self, token_ids: Iterable[int], param: str) -> None:
        """Raises ServiceError where a token id is out of range."""
        if not all(0 <= token_id < self._vocab_size for token_id in token_ids):
            message = f"{param} has a token id outside 0…{self._vocab_size - 1}"
            raise ServiceError(ErrorKind.INVALID_REQUEST, message, param=param)

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Text of tokens; special ones are left out unless asked for."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=not special))

    def token_text(self, token_id: int) -> str:
        """Text of one token, special ones by their name."""
        return str(self._tokenizer.decode([token_id]))

    @cached_property
    def grammars(self) -> GrammarCompiler:
        return GrammarCompiler(self._tokenizer, vocab_size=self._vocab_size, stop_ids=self.stop_ids)

    @cached_property
    def _truncating(self) -> Any:
        """Truncation is a state of a tokenizer, not of a call: a tokenizer of its own always has it."""
        return copy.deepcopy(self._tokenizer)

    def _encode(self, text: TextOrPair, *, truncate: bool) -> Prompt:
        texts = [text] if isinstance(text, str) else text
        if truncate:
            encoding = self._truncating(*texts, truncation=True, max_length=self.max_length)
        elif self._tokenizer.is_fast:
            return self._encode_at_once(*texts)
        else:
            encoding = self._tokenizer(*texts, verbose=False)
        type_ids = encoding.get("token_type_ids")
        return Prompt(list(encoding["input_ids"]), None if type_ids is None else list(type_ids))

    def _encode_at_once(self, text: str, pair: str = "") -> Prompt:
        """As the tokenizer would, without what it has around this, which takes longer than a short text.

        A batch of one, because other threads go on meanwhile. An empty second text is none.
        """
        [encoding] = self._tokenizer.backend_tokenizer.encode_batch([(text, pair) if pair else text])
        has_types = "token_type_ids" in self._tokenizer.model_input_names
        return Prompt(encoding.ids, encoding.type_ids if has_types else None)


def _stop_ids(tokenizer: Any, source: str) -> set[int]:
    """The end-of-sequence tokens of the tokenizer and of the base's generation config, if it has one."""
    has_config = not Path(source).is_dir() or (Path(source) / "generation_config.json").is_file()
    configured = GenerationConfig.from_pretrained(source).eos_token_id if has_config else None
    ids = configured if isinstance(configured, list) else [configured]
    return {token for token in [tokenizer.eos_token_id, *ids] if token is not None}
