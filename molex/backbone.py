"""The base model as a set of layers, any of which can run on any rows at any depth.

The modules of transformers' blocks do the work, in two halves a layer (`molex/layers.py`). Attention, between
them, has no weights, so all layers that run at one depth share it (`Backbone.attend`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from molex.attention import AttentionOptions, KVStreams, rotated
from molex.backends import Backend, Wanted, lay_out, load_exported
from molex.errors import BaseModelError
from molex.exported import Exported, is_exported, read_about
from molex.family import FAMILIES, attention_options
from molex.heads import HeadKind
from molex.layers import Layers, StockLayers, copied, run_once
from molex.native.vocabulary import NativeEmbedding, NativeVocabulary
from molex.native.weights import Bits
from molex.packing import Indices, Packed
from molex.stock import load_around_layers, load_stock


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


class Backbone:
    """A base model taken apart: embedding, T layers, final norm and language model head."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        has_pooler: bool = False,
        routed_dtype: torch.dtype | None = None,
        exported: Exported | None = None,
    ) -> None:
        """`model` is a bare encoder or a causal language model.

        With a `routed_dtype` of its own the routed branch has a second copy of the layers, in that precision.
        Layers that were `exported` have no weights in the model.
        """
        self.config: Any = model.config
        self.family = FAMILIES[self.config.model_type]
        base = model.base_model
        model.eval().requires_grad_(False)
        self._base: Any = base
        self.lm_head: Any = getattr(model, "lm_head", None) if self.family.causal else None
        self.pooler = _pooler(base) if has_pooler else None
        self.exported = exported
        self._digest = _digest(model) if exported is None else exported.digest
        blocks = list(attrgetter(self.family.layers)(base))
        routed = [] if routed_dtype in (None, base.dtype) else copied(blocks, routed_dtype)
        self._outside_layers = _nbytes(model) - sum(map(_nbytes, blocks))
        self.stock_blocks = blocks
        stock = StockLayers(blocks, self.family, routed)
        self.modules = stock.modules
        self._attention = [
            AttentionOptions(self.num_kv_heads, *attention_options(block, self.family, self.config))
            for block in blocks
        ]
        self.num_layers = len(blocks)
        self.layers: Layers = stock
        self.runs_on = "PyTorch"
        """What runs the layers, in words, and why."""

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        routed_dtype: torch.dtype | None = None,
    ) -> Backbone:
        """Load a local folder or hub id. Raises BaseModelError, naming the base, if it can't be served."""
        if is_exported(base):
            wanted = {dtype, routed_dtype or dtype}
            if wanted != {torch.float32} or torch.device(device).type != "cpu":
                raise BaseModelError(f"base model {str(base)!r}: it was exported for CPUs, in float32")
            return cls._from_export(Path(base))
        model, has_pooler = load_stock(base, dtype)
        return cls(model.to(device), has_pooler=has_pooler, routed_dtype=routed_dtype)

    @classmethod
    def _from_export(cls, folder: Path) -> Backbone:
        exported = read_about(folder)
        model, has_pooler = load_around_layers(folder)
        backbone = cls(model, has_pooler=has_pooler, exported=exported)
        backbone.layers = load_exported(folder, exported, backbone.num_layers)
        backbone.runs_on = f"ONNX Runtime, as exported in {exported}"
        backbone._use_vocabulary()
        return backbone

    # Asked for by every pass and every load; a stock model looks for them among its parameters.
    @cached_property
    def dtype(self) -> torch.dtype:
        return self._base.dtype  # type: ignore[no-any-return]

    @cached_property
    def device(self) -> torch.device:
        return self._base.device  # type: ignore[no-any-return]

    @cached_property
    def spec(self) -> BaseSpec:
        return BaseSpec(
            model_type=self.config.model_type,
            num_layers=self.num_layers,
            hidden_size=self.config.hidden_size,
            vocab_size=self.config.vocab_size,
            token_types=getattr(self.config, "type_vocab_size", 0),
            max_length=self.family.max_length(self.config),
            modules=self.modules,
            prefix=f"{self.family.root}.{self.family.layers}",
            head=self.family.head,
            generates=self.lm_head is not None,
            has_pooler=self.pooler is not None,
            digest=self._digest,
        )

    # From the shapes of the layers: a config may hold numbers of heads that its family does not read.
    @cached_property
    def head_dim(self) -> int:
        return self.modules[self.family.join][0] // self.num_heads

    @cached_property
    def num_kv_heads(self) -> int:
        projected = sum(self.modules[name][1] for name in self.family.projections)
        return (projected // self.head_dim - self.num_heads) // 2

    @cached_property
    def num_heads(self) -> int:
        return int(self.config.num_attention_heads)

    @cached_property
    def layers_share_attention(self) -> bool:
        """Whether all layers scale scores alike and see as far back, so that a call can serve several."""
        return len(set(self._attention)) == 1

    @property
    def attention_options(self) -> AttentionOptions:
        """Of all layers, where they share attention."""
        return self._attention[0]

    @property
    def nbytes(self) -> int:
        """Of all weights, in memory."""
        return self._outside_layers + self.layers.nbytes

    def prepack(
        self, bits: Bits | None = None, routed_bits: Bits | None = None, backend: Backend = "auto"
    ) -> None:
        """Lay the weights of all layers out for inference; no gradients afterwards.

        By themselves they run on the kernels of `molex/native` where the CPU has what those need, as grouped
        products on a GPU in bfloat16 (`molex/grouped`), else, in float32, on ONNX Runtime where that is
        installed and faster (`molex/onnx`), or as in `molex/prepack.py`. With `bits` all layers have weights
        in so many, with `routed_bits` those of the routed branch, which are a second copy then: this takes
        the kernels or ONNX Runtime. Raises BaseModelError where what is asked for cannot run.
        """
        if self.exported is not None:
            self.exported.check(bits, routed_bits, backend)
        if not isinstance(self.layers, StockLayers):
            return
        wanted = Wanted(self.layers, self.family, self.config, bits, routed_bits or bits)
        self.layers, self.runs_on = lay_out(wanted, backend)
        self._use_vocabulary()

    def _use_vocabulary(self) -> None:
        """Have the language model head run on what runs the layers, in the precision of hidden states."""
        if self.lm_head is None:
            return
        head, vocabulary = self.lm_head, self.layers.vocabulary(self.lm_head)
        if isinstance(vocabulary, NativeVocabulary):
            self._outside_layers += vocabulary.nbytes - head.weight.nbytes
            if self._base.get_input_embeddings().weight is head.weight:
                self._base.set_input_embeddings(NativeEmbedding(vocabulary))
        self.lm_head = vocabulary

    def warm_up(self, max_rows: int) -> None:
        """Have the matrix kernels for up to `max_rows` rows compiled now, not while a request waits.

        All layers of a branch have the same shapes, so its first one calls for every kernel.
        """
        width = self.num_heads * self.head_dim
        for number in {0, self.layers.first_routed}:
            for rows in self.layers.compiled_sizes(max_rows):
                run_once(self.layers, number, rows, self.config.hidden_size, width, self.device)

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

    def attend(
        self,
        number: int,
        projected: Tensor,
        packed: Packed,
        rotary: tuple[Tensor, Tensor] | None,
        kv: KVStreams | None,
        rows: Indices,
    ) -> Tensor:
        """What lies between the halves of layer `number`, or of several if `layers_share_attention`.

        `projected` [n, (num_heads + 2 · num_kv_heads) · head_dim] and `rotary` belong to the tokens of
        `packed`. Returns [m, num_heads · head_dim] for its tokens `rows` [m].
        """
        heads = projected.view(len(projected), -1, self.head_dim)
        if rotary is not None:
            heads = rotated(heads, self.num_kv_heads, *rotary)
        options = self._attention[number % self.num_layers]
        return self.layers.attend(heads, packed, kv, options, rows).flatten(-2)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The norm after the last layer, where the family has one."""
        return hidden if self.family.norm is None else getattr(self._base, self.family.norm)(hidden)


def _pooler(base: Any) -> Callable[[Tensor], Tensor]:
    """The base's own pooler, on hidden states [m, d] that are pooled tokens already."""
    return lambda pooled: base.pooler(pooled[:, None].to(base.dtype))


def _nbytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _digest(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"
