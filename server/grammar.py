"""Text that has to follow a JSON schema, a regular expression or a list of choices, token by token.

llguidance (the extra `structured`) does the work; without it such requests are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from server.errors import ErrorKind, ServiceError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_GRAMMAR_CHARS = 65_536
MAX_LEXER_STATES = 20_000
"""Bounds the memory of one constraint to about 40 MB, at 2 kB a state."""

JSON_OPTIONS: Any = {
    # A schema could otherwise say itself that what the library cannot do is to be ignored.
    "lenient": False,
    # Small models like to fill the rest of the context with spaces.
    "whitespace_pattern": r"[ \n\t]{0,16}",
}


@dataclass(frozen=True)
class GrammarRequest:
    """What a text has to follow. `param` is the field of the request that says so."""

    kind: Literal["json_schema", "regex", "choice"]
    value: Any
    param: str


class GrammarConstraint:
    """The tokens that one text may go on with. Raises ServiceError where the grammar is too complex."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, param: str) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._param = param

    def copy(self) -> GrammarConstraint:
        """Another text under the same grammar."""
        return GrammarConstraint(self._matcher.deep_copy(), self._vocab_size, self._param)

    def allowed(self) -> Tensor:
        """Which tokens may come next, bool [vocab]; those that end a text among them where it may end."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        bits = np.unpackbits(mask, count=self._vocab_size, bitorder="little")
        return torch.from_numpy(bits).bool()

    def accept(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)
        self._check()

    @property
    def finished(self) -> bool:
        """Whether nothing can follow."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _invalid(self._param, self._matcher.get_error())


class GrammarCompiler:
    """Compiles grammars for the tokenizer of one base. Blocks: call it on a pool thread."""

    def __init__(self, tokenizer: Any, *, vocab_size: int, stop_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_ids = stop_ids

    def compile(self, request: GrammarRequest) -> GrammarConstraint:
        """Raises ServiceError naming what is wrong with a grammar, or what of it is not supported."""
        llguidance = _import_llguidance(request.param)
        try:
            text = json.dumps(request.value, ensure_ascii=False)
        except RecursionError:
            raise _invalid(request.param, "nested too deeply") from None
        if len(text) > MAX_GRAMMAR_CHARS:
            raise _invalid(request.param, f"longer than {MAX_GRAMMAR_CHARS} characters")
        write: dict[str, Callable[[], str]] = {
            "json_schema": lambda: llguidance.LLMatcher.grammar_from_json_schema(
                text, overrides=JSON_OPTIONS
            ),
            "regex": lambda: llguidance.LLMatcher.grammar_from_regex(request.value),
            "choice": lambda: llguidance.LLMatcher.grammar_from_lark(_alternatives(request.value)),
        }
        try:
            grammar = write[request.kind]()
        except ValueError as error:
            raise _invalid(request.param, str(error)) from None
        limits = llguidance.LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        matcher = llguidance.LLMatcher(self._tokens(request.param), grammar, log_level=0, limits=limits)
        constraint = GrammarConstraint(matcher, self._vocab_size, request.param)
        # Some grammars show only now that no text follows them.
        constraint.allowed()
        return constraint

    def _tokens(self, param: str) -> LLTokenizer:
        try:
            return self._ll_tokenizer
        except ValueError as error:
            message = f"{param} does not work with the tokenizer of this base: {error}"
            raise ServiceError(ErrorKind.UNSUPPORTED_PARAMETER, message, param=param) from None

    @cached_property
    def _ll_tokenizer(self) -> LLTokenizer:
        """Half a second for 49,152 tokens, when the first grammar comes."""
        from llguidance.hf import from_tokenizer  # noqa: PLC0415 (optional dependency)

        return from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=sorted(self._stop_ids))


def _alternatives(choices: list[str]) -> str:
    """A Lark grammar of literal texts, which Lark spells as JSON does."""
    return "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


def _invalid(param: str, reason: str) -> ServiceError:
    # The library's name for a dead end.
    words = "no text follows it" if reason.startswith("NoExtension") else " ".join(reason.split())[:300]
    return ServiceError(ErrorKind.INVALID_REQUEST, f"{param}: {words}", param=param)


def _import_llguidance(param: str) -> Any:
    try:
        import llguidance  # noqa: PLC0415 (optional dependency)
    except ImportError:
        message = f"{param} needs llguidance on the server: pip install 'molex-serve[structured]'"
        raise ServiceError(ErrorKind.UNSUPPORTED_PARAMETER, message, param=param) from None
    return llguidance
