"""molex: many adapters of MoLEx (Mixture of Layer Experts) and LoRA on one base model, in one batch."""

from molex.adapter import BARE, Adapter
from molex.adapter_file import read_adapter, write_adapter
from molex.errors import AdapterError, BaseModelError, InputError, MolexError
from molex.model import ModelOutput, MolexModel
from molex.row import Row

__all__ = [
    "BARE",
    "Adapter",
    "AdapterError",
    "BaseModelError",
    "InputError",
    "ModelOutput",
    "MolexError",
    "MolexModel",
    "Row",
    "read_adapter",
    "write_adapter",
]
