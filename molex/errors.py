"""The errors that `molex` raises for what a caller gave it.

MolexError           something given from outside is wrong; the message names it
├── BaseModelError   a base model that cannot be served
├── AdapterError     an adapter folder that cannot be loaded
└── InputError       tokens or parameters of one request
"""


class MolexError(ValueError):
    """Something given from outside is wrong. The message names it and is fit to be shown to a client."""


class BaseModelError(MolexError):
    """A base model folder is missing, incomplete or of an unsupported family."""


class AdapterError(MolexError):
    """An adapter folder is malformed, or does not fit the base model.

    `subject` is the tensor name, configuration field or file at fault; the message starts with it.
    """

    def __init__(self, subject: str, problem: str) -> None:
        super().__init__(f"{subject}: {problem}")
        self.subject = subject


class InputError(MolexError):
    """The tokens or parameters of one request cannot be processed."""
