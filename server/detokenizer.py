"""Turning generated tokens into text as they come, up to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 6
"""Prompt tokens decoded in front of the first new one: many tokenizers drop a text's leading space."""
MAX_HELD_TOKENS = 16
"""A character never spans this many tokens: what is still unreadable then is not a half character."""

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """Text of a growing list of tokens. A character is given out once all of its bytes are there."""

    def __init__(self, decode: Decode, prompt_ids: Sequence[int]) -> None:
        self._decode = decode
        self._context = list(prompt_ids[-CONTEXT_TOKENS:])
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token completes."""
        self._pending.append(token_id)
        text = self._new_text()
        if text.endswith(REPLACEMENT) and len(self._pending) < MAX_HELD_TOKENS:
            return ""
        self._shift(keep=not text)
        return text

    def flush(self) -> str:
        """What was waiting at the end, less the half character that a cut leaves."""
        text = self._new_text() if self._pending else ""
        self._pending = []
        return text.rstrip(REPLACEMENT)

    def _new_text(self) -> str:
        before = self._decode(self._context)
        return self._decode([*self._context, *self._pending])[len(before) :]

    def _shift(self, *, keep: bool) -> None:
        """Make the pending tokens context. Context never starts within a character."""
        context = [*self._context, *self._pending]
        self._context = context if keep or len(context) <= CONTEXT_TOKENS else self._pending
        self._pending = []


class StopStrings:
    """Holds back text that may be the beginning of a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of the text so far that certainly comes before any stop string."""
        text = self._held + text
        self._held = ""
        found = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        keep = self._held_length(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back in vain, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _held_length(self, text: str) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0


class TextStream:
    """The text of one generation."""

    def __init__(self, decode: Decode, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(decode, prompt_ids)
        self._stop = StopStrings(stop)
        self.length = 0
        """Characters decoded so far, held ones included."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stop.stopped

    def push(self, token_id: int) -> str:
        """The text that may go out now that this token has come."""
        return self._pass(self._detokenizer.push(token_id))

    def end(self) -> str:
        """The rest of the text, when no other token will come."""
        text = self._pass(self._detokenizer.flush())
        return text if self.stopped else text + self._stop.flush()

    def _pass(self, decoded: str) -> str:
        self.length += len(decoded)
        return "" if self.stopped else self._stop.push(decoded)
