"""The packed forward: one base model, many adapters, one batch.

Training, offline use and serving all run `MolexModel.run`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from molex.adapter import BARE, Adapter
from molex.adapter_file import read_adapter
from molex.backbone import Backbone, BaseSpec
from molex.backends import Backend
from molex.bank import AdapterBank
from molex.decoding import Decoding, can_decode, is_decoding
from molex.errors import InputError
from molex.forward import Forward
from molex.kv_cache import KVCache
from molex.layers import StockLayers
from molex.lora import BatchLora
from molex.native.layers import NativeLayers
from molex.native.weights import Bits
from molex.passes import Pass, RunOutput, RunStats, joined, uncounted
from molex.routing import flat_route
from molex.row import Row, check


@dataclass(frozen=True)
class ModelOutput:
    """`logits[i]` as in `RunOutput`; `routes[i]` lists the layer chosen at each mixed depth of request i."""

    logits: list[Tensor]
    routes: list[list[int | tuple[int, ...]]]


@dataclass(frozen=True)
class Stacks:
    """The factors of some adapters side by side; holding them does not hold the adapters."""

    adapters: list[ReferenceType[Adapter]]
    lora: BatchLora

    def are_of(self, adapters: list[Adapter]) -> bool:
        return [reference() for reference in self.adapters] == adapters


NO_STACKS = Stacks([], BatchLora([]))


class MolexModel:
    """A base model, loaded once, and the adapters that are resident on it. One thread uses it at a time."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._adapters: dict[str, Adapter] = {}
        self._stacks = NO_STACKS
        self.bank: AdapterBank | None = None
        """Where batches read the factors of their adapters, if not from stacks of their own."""
        self._decoding: Decoding | None = None

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        routed_dtype: torch.dtype | None = None,
    ) -> MolexModel:
        """Load a BERT, RoBERTa, GPT-2, Llama, Mistral or Qwen2 model from a local folder or hub id.

        `routed_dtype` is the precision of routed layers, by default `dtype`: what they return is multiplied
        by 1 - alpha, and so is their rounding error. In a precision of their own they are a second copy of
        the layers. Raises BaseModelError, which names the base and what is wrong with it.
        """
        return cls(Backbone.from_pretrained(base, dtype, device, routed_dtype))

    def prepack(
        self, bits: Bits | None = None, routed_bits: Bits | None = None, backend: Backend = "auto"
    ) -> None:
        """Lay the base's weights out for speed where the CPU gains from it; no training afterwards.

        See `Backbone.prepack` for weights in 8 or 4 bits, and for what may run the layers.
        """
        self.backbone.prepack(bits, routed_bits, backend)

    def use_bank(self, max_bytes: int) -> None:
        """Keep factors of adapters in an `AdapterBank` from now on, where PyTorch runs the layers.

        The kernels read the factors of each adapter where it keeps them: call `prepack` first.
        """
        if isinstance(self.backbone.layers, StockLayers):
            self._stacks = NO_STACKS
            self.bank = AdapterBank(max_bytes, torch.promote_types(self.dtype, torch.float32), self.device)

    def warm_up(self, max_rows: int) -> None:
        """Compile the matrix kernels of passes with up to `max_rows` tokens."""
        self.backbone.warm_up(max_rows)

    @property
    def spec(self) -> BaseSpec:
        return self.backbone.spec

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.dtype

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def nbytes(self) -> int:
        """What the base's weights take in memory, in all their precisions."""
        return self.backbone.nbytes

    @property
    def on_kernels(self) -> bool:
        """Whether the kernels run the layers."""
        return isinstance(self.backbone.layers, NativeLayers)

    @property
    def runs_on(self) -> str:
        """What runs the layers, in words, and why."""
        return self.backbone.runs_on

    @property
    def bank_bytes(self) -> int:
        """What the bank's arrays take in memory."""
        return self.bank.nbytes if self.bank is not None else 0

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The resident adapters by name, read-only."""
        return MappingProxyType(self._adapters)

    def load_adapter(self, name: str, folder: str | Path) -> Adapter:
        """Read a MoLEx or PEFT LoRA folder and keep it under a name, replacing what had it.

        Raises AdapterError, which names the tensor or field at fault; nothing is replaced then.
        """
        adapter = read_adapter(folder, self.spec, self.dtype, self.device)
        self._adapters[name] = adapter
        return adapter

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises InputError if there is none of that name."""
        if self._adapters.pop(name, None) is None:
            raise InputError(f"adapter {name!r} is not loaded")

    def new_cache(self, num_pages: int) -> KVCache:
        """A key-value cache for running generations, which need `pages_for` their tokens and streams."""
        return KVCache(
            num_pages,
            num_layers=self.spec.num_layers,
            num_heads=self.backbone.num_kv_heads,
            head_dim=self.backbone.head_dim,
            dtype=self.dtype,
            device=self.device,
        )

    def __call__(
        self,
        input_ids: Sequence[Sequence[int]],
        adapters: Sequence[str | None] | None = None,
        prompt_lengths: Sequence[int] | None = None,
        token_type_ids: Sequence[Sequence[int]] | None = None,
    ) -> ModelOutput:
        """Run requests of any lengths through any mix of resident adapters; None is the bare base.

        The first `prompt_lengths[i]` tokens of request i vote on its route, by default all of them. Takes no
        gradients. Raises InputError that names the request and what is wrong with it.
        """
        count = len(input_ids)
        names = [None] * count if adapters is None else adapters
        voters: Sequence[int | None] = [None] * count if prompt_lengths is None else prompt_lengths
        types: Sequence[Sequence[int] | None] = [None] * count if token_type_ids is None else token_type_ids
        given = {"adapters": names, "prompt_lengths": voters, "token_type_ids": types}
        for argument, values in given.items():
            if len(values) != count:
                raise InputError(f"{argument}: {len(values)} given for {count} requests")
        for number, ids in enumerate(input_ids):
            if not all(isinstance(token, int) for token in ids):
                raise InputError(f"request {number}: a token id is not a whole number")
        rows = [
            Row(ids, self._resident(name), voters=n, token_type_ids=t)
            for ids, name, n, t in zip(input_ids, names, voters, types, strict=True)
        ]
        with torch.no_grad():
            output = self.run(rows, lm_logits="all")
        return ModelOutput(output.logits, [flat_route(route) for route in output.routes])

    def _resident(self, name: str | None) -> Adapter:
        if name is None:
            return BARE
        if name not in self._adapters:
            raise InputError(f"adapter {name!r} is not loaded")
        return self._adapters[name]

    def run(
        self,
        rows: Sequence[Row],
        cache: KVCache | None = None,
        lm_logits: Literal["last", "all"] = "last",
        on_depths: Callable[[], None] = uncounted,
    ) -> RunOutput:
        """The packed forward over requests of any adapters, lengths and stages.

        Takes gradients where the caller enables them. `cache` keeps keys and values of the rows that have a
        slot. `lm_logits` chooses between the next-token logits and those of every token.

        Where the kernels can, generations that run go through all depths in one call, and the other rows
        through a pass of their own. `on_depths` is called after each depth of a pass.
        """
        if not rows:
            return RunOutput([], [], torch.zeros(()), RunStats(0, 0, 0))
        if cache is None or lm_logits == "all" or not can_decode(self.backbone):
            return self._run_pass(rows, cache, lm_logits, on_depths)
        running = [i for i, row in enumerate(rows) if is_decoding(row)]
        others = [i for i, row in enumerate(rows) if not is_decoding(row)]
        outputs = []
        if running:
            outputs.append(self._decode([rows[i] for i in running], cache))
        if others:
            outputs.append(self._run_pass([rows[i] for i in others], cache, lm_logits, on_depths))
        return (
            outputs[0]
            if len(outputs) == 1
            else joined(outputs, [*running, *others], len(distinct_adapters(rows)))
        )

    def _run_pass(
        self,
        rows: Sequence[Row],
        cache: KVCache | None,
        lm_logits: Literal["last", "all"],
        on_depths: Callable[[], None] = uncounted,
    ) -> RunOutput:
        forward = self.begin(rows, cache, lm_logits)
        forward.advance(forward.depths_left, on_depths)
        return forward.output()

    def _decode(self, rows: Sequence[Row], cache: KVCache) -> RunOutput:
        for number, row in enumerate(rows):
            check(number, row, self.spec, cache)
        if self._decoding is None or not self._decoding.serves(rows, cache):
            adapters = distinct_adapters(rows)
            self._decoding = Decoding(rows, adapters, self._lora_of(adapters), cache, self.backbone)
        return self._decoding.step(rows)

    def begin(
        self,
        rows: Sequence[Row],
        cache: KVCache | None = None,
        lm_logits: Literal["last", "all"] = "last",
    ) -> Pass:
        """A forward pass as in `run` that has not run through any depth yet."""
        for number, row in enumerate(rows):
            check(number, row, self.spec, cache)
        adapters = distinct_adapters(rows)
        forward = Forward(rows, adapters, self._lora_of(adapters), cache, self.backbone, lm_logits)
        return Pass(forward, lm_logits)

    def _lora_of(self, adapters: list[Adapter]) -> BatchLora:
        """Keep the last batch's stacked factors: a decoding step has the adapters of the one before."""
        stacks = self._stacks
        if not stacks.are_of(adapters):
            # What the last batch read from the bank may go for what this one needs there.
            stacks = self._stacks = NO_STACKS
            lora = BatchLora([adapter.lora for adapter in adapters])
            if self.bank is not None:
                self.bank.serve(lora)
            forget = partial(_forget_stacks, ref(self))
            stacks = self._stacks = Stacks([ref(adapter, forget) for adapter in adapters], lora)
        return stacks.lora


def distinct_adapters(rows: Sequence[Row]) -> list[Adapter]:
    return list({id(row.adapter): row.adapter for row in rows}.values())


def _forget_stacks(model: ReferenceType[MolexModel], _: ReferenceType[Adapter]) -> None:
    """An adapter of the last batch has died, on whatever thread: its stacked factors are to go with it."""
    if (alive := model()) is not None:
        alive._stacks = NO_STACKS
