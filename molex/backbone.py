"""The base model as a set of layers, any of which can run on any rows at any depth.

The modules of transformers' blocks do the work, in two halves a layer (`molex/family.py`). Attention, between
them, has no weights, so all layers that run at one depth share it (`molex/attention.py`). Linear layers are
wrapped: they add the low-rank updates of the batch (`molex/lora.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.pytorch_utils import Conv1D

from molex.attention import KVStreams, packed_attention
from molex.errors import BaseModelError
from molex.family import FAMILIES, attention_options
from molex.heads import HeadKind
from molex.lora import ActiveLora, AdaptedLinear, LoraSwitch
from molex.packing import Packed
from molex.prepack import PrepackedLinear, can_prepack, padded_rows


@dataclass(frozen=True)
class BaseSpec:
    """The facts of a base model that an adapter must fit; no weights.

    `modules` gives the linear layers of a block and their (inputs, outputs); `prefix` is the path of the list
    of blocks in PEFT's tensor names; `token_types` is the number of token types, 0 where there are none;
    `has_pooler` says whether a BERT base brings trained pooler weights;
    `digest` is `sha256:…` of the weights and their names.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    token_types: int
    max_length: int
    modules: Mapping[str, tuple[int, int]]
    prefix: str
    head: HeadKind
    generates: bool
    has_pooler: bool
    digest: str


@dataclass(frozen=True)
class LayerCall:
    """One layer, the packed tokens of the batch that run through it (None: all), and their adapters.

    `needed` are the rows among these tokens whose output is needed (None: all), `needed_lora` their adapters.
    """

    layer: int
    tokens: Tensor | None
    lora: ActiveLora | None
    needed: Tensor | None = None
    needed_lora: ActiveLora | None = None


class Backbone:
    """A base model taken apart: embedding, T layers, final norm and language model head."""

    def __init__(self, model: PreTrainedModel, *, has_pooler: bool = False) -> None:
        """`model` is a bare encoder or a causal language model."""
        self.config: Any = model.config
        self.family = FAMILIES[self.config.model_type]
        base = model.base_model
        model.eval().requires_grad_(False)
        self._base: Any = base
        self.lm_head: nn.Module | None = getattr(model, "lm_head", None) if self.family.causal else None
        self.pooler = _pooler(base) if has_pooler else None
        self.layers: list[Any] = list(attrgetter(self.family.layers)(base))
        self._attention = [attention_options(layer, self.family, self.config) for layer in self.layers]
        self.switch = LoraSwitch()
        self.prepacked = False
        self._digest = _digest(model)
        self._modules = _wrap_linear_layers(self.layers, self.switch)

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Backbone:
        """Load a local folder or hub id. Raises BaseModelError, naming the base, if it can't be served."""
        is_path = isinstance(base, Path) or base.startswith((".", "/"))
        if is_path and not Path(base).is_dir():
            raise BaseModelError(f"base model {str(base)!r}: no such folder")
        try:
            config = AutoConfig.from_pretrained(base)
        except (OSError, ValueError) as error:
            raise BaseModelError(f"base model {str(base)!r}: {error}") from error
        _check_supported(str(base), config)
        options: dict[str, Any] = {"dtype": dtype}
        loader = AutoModelForCausalLM if FAMILIES[config.model_type].causal else AutoModel
        if config.model_type == "roberta":
            options["add_pooling_layer"] = False
        try:
            model, info = loader.from_pretrained(base, output_loading_info=True, **options)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise BaseModelError(f"base model {str(base)!r}: {error}") from error
        missing = {key for key in info["missing_keys"] if "pooler" not in key}
        if missing:
            raise BaseModelError(f"base model {str(base)!r}: no weights for {sorted(missing)[0]}")
        has_pooler = config.model_type == "bert" and not info["missing_keys"]
        return cls(model.to(device), has_pooler=has_pooler)

    @property
    def dtype(self) -> torch.dtype:
        return self._base.dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        return self._base.device  # type: ignore[no-any-return]

    @cached_property
    def spec(self) -> BaseSpec:
        return BaseSpec(
            model_type=self.config.model_type,
            num_layers=len(self.layers),
            hidden_size=self.config.hidden_size,
            vocab_size=self.config.vocab_size,
            token_types=getattr(self.config, "type_vocab_size", 0),
            max_length=self.family.max_length(self.config),
            modules=self._modules,
            prefix=f"{self.family.root}.{self.family.layers}",
            head=self.family.head,
            generates=self.lm_head is not None,
            has_pooler=self.pooler is not None,
            digest=self._digest,
        )

    @property
    def num_kv_heads(self) -> int:
        return int(getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads)

    @property
    def head_dim(self) -> int:
        default = self.config.hidden_size // self.config.num_attention_heads
        return int(getattr(self.config, "head_dim", None) or default)

    @property
    def layers_share_attention(self) -> bool:
        """Whether all layers scale scores alike and see as far back, so that a call can serve several."""
        return len(set(self._attention)) == 1

    def prepack(self) -> None:
        """Lay the weights of all layers out for inference (`molex/prepack.py`); no gradients afterwards."""
        if can_prepack(self.dtype, self.device) and not self.prepacked:
            self.prepacked = True
            for layer in self.layers:
                for module in layer.modules():
                    if isinstance(module, AdaptedLinear):
                        module.base = PrepackedLinear(module.base)

    def embed(self, tokens: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
        """Token ids, positions and token types [n] → hidden states [n, d]."""
        types = None if types is None else types[None]
        return self.family.embed(self._base, tokens[None], positions[None], types)[0]

    def rotary(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """(cos, sin) [n, head_dim] at positions [n], for families that rotate queries and keys."""
        if not self.family.rotary:
            return None
        cos, sin = self._base.rotary_emb(hidden[None], positions[None])
        return cos[0], sin[0]

    def run_layers(
        self,
        calls: Sequence[LayerCall],
        hidden: Tensor,
        packed: Packed,
        rotary: tuple[Tensor, Tensor] | None,
        kv: KVStreams | None,
    ) -> list[Tensor]:
        """Run layers on rows of hidden [n, d]; the output [m, d] of each.

        `packed` describes the rows of all calls side by side, `rotary` is for these. Several calls need
        `layers_share_attention`.
        """
        inputs = [hidden if call.tokens is None else hidden.index_select(0, call.tokens) for call in calls]
        lengths = [len(x) for x in inputs]
        inputs = [self._padded(x) for x in inputs]
        projected = [self._project(call, x) for call, x in zip(calls, inputs, strict=True)]
        query, key, value = (
            _side_by_side(pieces, lengths).unflatten(-1, (-1, self.head_dim))
            for pieces in zip(*projected, strict=True)
        )
        if rotary is not None:
            query, key = _rotated(query, key, *rotary)
        scaling, window = self._attention[calls[0].layer]
        attended = packed_attention(query, key, value, packed, kv, scaling, window).flatten(-2)
        pieces = attended.split(lengths)
        return [self._finish(call, x, piece) for call, x, piece in zip(calls, inputs, pieces, strict=True)]

    def _project(self, call: LayerCall, x: Tensor) -> Sequence[Tensor]:
        with self.switch.on(call.lora):
            return self.family.project(self.layers[call.layer], x)

    def _finish(self, call: LayerCall, x: Tensor, attended: Tensor) -> Tensor:
        lora = call.lora
        if call.needed is not None:
            x, attended = x.index_select(0, call.needed), attended.index_select(0, call.needed)
            lora = call.needed_lora
        with self.switch.on(lora):
            output = self.family.finish(self.layers[call.layer], self._padded(x), self._padded(attended))
        return output[: len(attended)]

    def _padded(self, x: Tensor) -> Tensor:
        """x [n, d] with rows of zeros behind, where the weights are prepacked."""
        padding = padded_rows(len(x)) - len(x) if self.prepacked else 0
        return functional.pad(x, (0, 0, 0, padding)) if padding else x

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The norm after the last layer, where the family has one."""
        return hidden if self.family.norm is None else getattr(self._base, self.family.norm)(hidden)


def _side_by_side(pieces: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """The first rows of each piece, without its padding."""
    rows = [piece[:length] for piece, length in zip(pieces, lengths, strict=True)]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Sequence[Tensor]:
    """Rotary position embedding of query and key [n, heads, head_dim]."""
    return apply_rotary_pos_emb(query, key, cos, sin, unsqueeze_dim=1)  # type: ignore[no-any-return]


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


def _pooler(base: Any) -> Callable[[Tensor], Tensor]:
    """The base's own pooler, on hidden states [m, d] that are pooled tokens already."""
    return lambda pooled: base.pooler(pooled[:, None].to(base.dtype))


def _wrap_linear_layers(layers: list[Any], switch: LoraSwitch) -> dict[str, tuple[int, int]]:
    """Wrap every linear layer of every block; returns their names in a block and (inputs, outputs)."""
    modules: dict[str, tuple[int, int]] = {}
    for number, layer in enumerate(layers):
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear | Conv1D):
                layer.set_submodule(name, AdaptedLinear(module, (number, name), switch))
                modules[name] = _sizes(module)
    return modules


def _sizes(linear: nn.Linear | Conv1D) -> tuple[int, int]:
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    inputs, outputs = linear.weight.shape
    return inputs, outputs


def _digest(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"
