"""Layers on the kernels: all layer calls of a depth, and all adapters in them, in one call a half."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import numpy as np
import torch
from torch import Tensor, nn

from molex.attention import AttentionOptions, KVStreams, attend
from molex.config import VoteConfig
from molex.errors import InputError
from molex.family import Family
from molex.gate import Gate, LinearGate, gate_logits
from molex.layers import StockLayers
from molex.lora import AdaptedLinear, BatchLora, LoraWeights, LowRank
from molex.native import build
from molex.native.vocabulary import NativeVocabulary
from molex.native.votes import elect
from molex.native.weights import Bits, PackedLinear, pack
from molex.packing import Indices, Packed
from molex.plan import RoutePlan
from molex.stage import Stage
from molex.votes import Ballots, Election

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""transformers' names of the functions that the kernels know."""

# The fields of `Factors` in low_rank.h: the addresses of A and Bᵀ, the rank, the outputs, the scaling.
FACTOR_FIELDS = 5
LARGEST_BLOCK = 64
"""Rows that the kernels take at a time."""


class FactorTable:
    """Where the factors of one adapter lie in memory, for the kernels: `fields` [sites, 5].

    It keeps the tensors that the addresses are of. For an adapter that was read from a folder these are its
    own; other factors are copied where they lie in another order, and `refresh` copies those anew that are
    being trained.
    """

    def __init__(self, lora: LoraWeights, modules: Mapping[str, tuple[int, int]], num_layers: int) -> None:
        """`modules` are the linear layers of a block in the order of the sites, with (inputs, outputs).

        Raises InputError for factors that do not fit them: the kernels read what the addresses promise.
        """
        places = {name: place for place, name in enumerate(modules)}
        self._kept: list[Tensor] = []
        self._in_training: list[tuple[LowRank, Tensor, Tensor]] = []
        sites, rows = [], []
        for (layer, module), update in lora.updates.items():
            a, b = update.a, update.b
            (rank, inputs), (outputs, ranks) = a.shape, b.shape
            if layer >= num_layers or modules.get(module) != (inputs, outputs) or rank != ranks:
                raise InputError(f"the factors of {module} in layer {layer} do not fit the base model")
            a, b = _row_by_row(a), _row_by_row(b.T)
            self._kept += [a, b]
            if update.takes_gradients:
                self._in_training.append((update, a, b))
            sites.append(layer * len(places) + places[module])
            rows.append((a.data_ptr(), b.data_ptr(), rank, outputs, _bits(update.scaling)))
        fields = np.zeros((num_layers * len(places), FACTOR_FIELDS), dtype=np.int64)
        if rows:
            fields[sites] = rows
        self.fields = torch.from_numpy(fields)

    def refresh(self) -> None:
        """Have the addresses hold what the factors are by now."""
        for update, a, b in self._in_training:
            with torch.inference_mode():  # What was made in this mode is changed in it alone.
                a.copy_(update.a)
                b.copy_(update.b.T)


def _row_by_row(factor: Tensor) -> Tensor:
    """A factor in float32 and contiguous: itself, where that is how it lies."""
    if factor.dtype == torch.float32 and factor.is_contiguous() and not factor.requires_grad:
        return factor
    return factor.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def _bits(number: float) -> int:
    """The bits of a number in double precision, in the place of an integer."""
    return int(np.float64(number).view(np.int64))


class NativeLayers:
    """The layers of a base model with packed weights, in float32, bfloat16, 8 or 4 bits.

    All that is not a product is in the precision of the own layers. What weights in another one multiply is
    rounded to it first, to bytes on a scale of each row where weights have 8 or 4 bits, if the CPU has
    products of such values: without them weights become float32, and rows are not rounded. No gradients.
    """

    def __init__(
        self, stock: StockLayers, family: Family, config: Any, bits: Bits | None, routed_bits: Bits | None
    ) -> None:
        """Pack the weights of blocks; those of the routed branch once more if they are to differ."""
        blocks, routed = stock.blocks[: stock.num_layers], stock.blocks[-stock.num_layers :]
        self.first_routed = stock.num_layers if stock.first_routed or routed_bits != bits else 0
        self._modules = stock.modules
        self._family = family
        self.dtype = stock.dtype
        self.nbytes = 0
        norm_after = family.norm_before is None
        eps = _eps(blocks[0].get_submodule(family.norms[0]))
        activation = ACTIVATIONS[getattr(config, family.activation)]
        self._num_layers = stock.num_layers
        self.packed = torch.classes.molex.PackedLayers(
            self.dtype == torch.bfloat16,
            activation,
            len(family.up) == 2,
            norm_after,
            eps,
            self._num_layers,
            len(self._modules),
        )
        for block in blocks:
            self._add(block, bits)
        for block in routed if self.first_routed else []:
            self._add(block, routed_bits)
        self._tables: WeakKeyDictionary[LoraWeights, FactorTable] = WeakKeyDictionary()
        self._factors: tuple[ReferenceType[BatchLora], Tensor] | None = None

    def _add(self, block: Any, bits: Bits | None) -> None:
        family, places = self._family, list(self._modules)
        parts = [family.projections, (family.join,), family.up, (family.down,)]
        linears: list[PackedLinear] = []
        for number, names in enumerate(parts):
            modules = [attrgetter(name)(block).base for name in names]
            sites = [places.index(name) for name in names]
            linears.append(pack(modules, sites, gated=number == 2 and len(names) == 2, bits=bits))
        norms = [_norm(block.get_submodule(name)) for name in family.norms]
        self.packed.add([linear.tensors for linear in linears], [linear.inputs for linear in linears], norms)
        self.nbytes += sum(linear.nbytes for linear in linears)
        self.nbytes += sum(tensor.nbytes for norm in norms for tensor in norm)

    def padded_rows(self, rows: int) -> int:
        return rows

    def compiled_sizes(self, max_rows: int) -> Sequence[int]:
        """The kernels pad blocks of rows to multiples of 4 themselves."""
        sizes = [1, 2, 3, *range(4, LARGEST_BLOCK + 1, 4)]
        return [size for size in sizes if size <= max_rows]

    def project(self, stage: Stage, numbers: Sequence[int], hidden: Tensor) -> Tensor:
        runs, factors = stage.runs_side_by_side, self.factors_of(stage.lora)
        result: Tensor = self.packed.project(hidden, stage.tokens, numbers, stage.counts, runs, factors)
        return result

    def finish(
        self, stage: Stage, numbers: Sequence[int], hidden: Tensor, attended: Tensor
    ) -> Sequence[Tensor]:
        runs, factors = stage.runs_side_by_side, self.factors_of(stage.lora)
        rows, counts = stage.tokens, stage.counts
        return [self.packed.finish(hidden, rows, attended, numbers, counts, runs, factors)]

    def attend(
        self, heads: Tensor, packed: Packed, kv: KVStreams | None, options: AttentionOptions, rows: Indices
    ) -> Tensor:
        if packed.past.any():
            return attend(heads, packed, kv, options, rows)
        if kv is not None:
            kv.write(heads[:, -2 * options.num_kv_heads :])
        output: Tensor = torch.ops.molex.attend.default(
            heads, packed.bounds, options.num_kv_heads, options.scaling, packed.causal, options.window or 0
        )
        return output if len(rows) == len(output) else output.index_select(0, torch.from_numpy(rows))

    def gate_logits(
        self, gates: Sequence[Gate], lengths: Sequence[Sequence[int]], hidden: Tensor, tokens: Tensor
    ) -> Tensor:
        if not all(is_linear(gate) for gate in gates):
            return gate_logits(gates, lengths, hidden, tokens)
        counts = [sum(numbers) for numbers in lengths]
        tensors = [(gate.weight, gate.bias) for gate in gates if isinstance(gate, LinearGate)]
        weights, biases = zip(*tensors, strict=True)
        logits: Tensor = torch.ops.molex.gate_logits.default(hidden, tokens, counts, weights, biases)
        return logits

    def elect(self, ballots: Ballots, vote: VoteConfig, top_k: int) -> Election:
        return elect(ballots, vote, top_k)

    def mix(self, layout: Packed, plan: RoutePlan, outputs: Sequence[Tensor]) -> Tensor:
        assert plan.own is not None
        assert plan.weights is not None
        together = outputs[0] if len(outputs) == 1 else torch.cat(list(outputs))
        own, visits, weights = plan.own.float(), torch.from_numpy(plan.requests), plan.weights.float()
        mixed: Tensor = torch.ops.molex.mix.default(together, layout.bounds, own, visits, weights)
        return mixed

    def vocabulary(self, head: nn.Module) -> nn.Module:
        return NativeVocabulary(head)

    def factors_of(self, lora: BatchLora) -> Tensor:
        """The tables of the batch's adapters [members, sites, 5]."""
        tables = [self._table(weights) for weights in lora.adapters]
        for table in tables:
            table.refresh()
        of_last_batch = self._factors
        if of_last_batch is None or of_last_batch[0]() is not lora:
            sites = self._num_layers * len(self._modules)
            empty = torch.empty(0, sites, FACTOR_FIELDS, dtype=torch.int64)
            fields = torch.stack([table.fields for table in tables]) if tables else empty
            of_last_batch = self._factors = ref(lora), fields
        return of_last_batch[1]

    def _table(self, lora: LoraWeights) -> FactorTable:
        if lora not in self._tables:
            self._tables[lora] = FactorTable(lora, self._modules, self._num_layers)
        return self._tables[lora]


def why_not_natively(stock: StockLayers, family: Family, config: Any) -> str | None:
    """Why layers cannot run on the kernels; None where they can."""
    if (activation := getattr(config, family.activation)) not in ACTIVATIONS:
        return f"do not know the function {activation}"
    device = next(stock.blocks[0].parameters()).device
    reasons = (build.why_not(dtype, device) for dtype in dict.fromkeys(stock.dtypes))
    return next((reason for reason in reasons if reason is not None), None)


def release(blocks: Sequence[Any]) -> None:
    """Let go of linear layers whose weights have been packed."""
    for block in blocks:
        for module in block.modules():
            if isinstance(module, AdaptedLinear):
                module.base = nn.Identity()


def is_linear(gate: Gate) -> bool:
    """Whether the kernels know a gate and its weights as they lie."""
    return isinstance(gate, LinearGate) and all(
        tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in (gate.weight, gate.bias)
    )


def _norm(module: Any) -> list[Tensor]:
    """[weight, bias] of a LayerNorm, [weight] of an RMSNorm, which the kernels read in float32."""
    tensors = [module.weight] if getattr(module, "bias", None) is None else [module.weight, module.bias]
    return [tensor.detach().float().contiguous() for tensor in tensors]


def _eps(module: Any) -> float:
    return float(module.eps if isinstance(module, nn.LayerNorm) else module.variance_epsilon)
