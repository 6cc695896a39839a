"""Adapters in memory: what a tenant brings to a base model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from molex.backbone import BaseSpec
from molex.config import AdapterConfig, GateConfig, MolexConfig
from molex.errors import AdapterError
from molex.gate import CosineGate, Gate, LinearGate
from molex.heads import Head, Shape, head_shapes
from molex.lora import LoraWeights, LowRank, Site

PEFT_PREFIX = "base_model.model."
MIX = "molex.mix"
MIX_LOGITS = "molex.mix_logits"
"""Two scalars (a, b) per pair, while a mixture is learned: (w_own, w_routed) = softmax(a, b)."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """A gate, mixing weights, low-rank updates and a head; each of them optional.

    Never changed once loaded: a request keeps the object it was admitted with, so a reload cannot touch it.
    """

    config: AdapterConfig
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Every weight by its name in the adapter file."""
    lora: LoraWeights = field(default_factory=LoraWeights)
    gates: Mapping[int, Gate] = field(default_factory=dict)
    """The gate of each mixed depth; a shared one stands at every depth."""
    head: Head | None = None
    digest: str = ""
    """`sha256:…` of the folder's two files; empty for what was not read from a folder."""

    @property
    def kind(self) -> str:
        return self.config.kind

    @property
    def task_type(self) -> str:
        return self.config.task_type

    @property
    def rank(self) -> int:
        return self.config.r

    @property
    def num_labels(self) -> int:
        return 0 if self.head is None else self.head.num_labels

    @property
    def regression(self) -> bool:
        """Whether its one logit is the answer itself."""
        return self.config.regression

    @property
    def id2label(self) -> dict[int, str]:
        """The name of each label: the adapter's own, or LABEL_0, LABEL_1, … as transformers calls them."""
        if self.config.id2label is not None:
            return dict(self.config.id2label)
        return {i: f"LABEL_{i}" for i in range(self.num_labels)}

    @cached_property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def molex(self) -> MolexConfig | None:
        return self.config.molex

    @property
    def num_streams(self) -> int:
        """Streams of keys and values that a token has: of its own layer, and of each routed one."""
        return 1 if self.molex is None else 1 + self.molex.top_k

    def parameters(self) -> dict[str, Tensor]:
        """The trainable tensors, by name."""
        return {name: tensor for name, tensor in self.tensors.items() if tensor.requires_grad}

    def mixing_pairs(self) -> Tensor:
        """(w_own, w_routed) [depths, 2] of the mixed depths, in order."""
        assert self.molex is not None
        if MIX in self.tensors:
            return self.tensors[MIX]
        return self.tensors[MIX_LOGITS].softmax(dim=-1).expand(len(self.molex.mixed_depths), 2)


BARE = Adapter(AdapterConfig(task_type="CAUSAL_LM", r=0, lora_alpha=0, target_modules=()))
"""The base model itself: no adapter is a value, not a branch."""


def adapted_sites(config: AdapterConfig, spec: BaseSpec) -> list[Site]:
    """The linear layers that the adapter updates. A target names the end of a module's path, as in PEFT."""
    layers = range(spec.num_layers) if config.layers_to_transform is None else config.layers_to_transform
    modules: list[str] = []
    for target in config.target_modules:
        found = [name for name in spec.modules if name == target or name.endswith("." + target)]
        if not found:
            known = ", ".join(spec.modules)
            raise AdapterError("target_modules", f"{target!r} names no linear layer of a block ({known})")
        modules += found
    return [(layer, module) for layer in layers for module in dict.fromkeys(modules)]


def lora_names(spec: BaseSpec, site: Site) -> tuple[str, str]:
    """The names of A and B of a site in an adapter file."""
    layer, module = site
    stem = f"{PEFT_PREFIX}{spec.prefix}.{layer}.{module}"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def lora_shapes(config: AdapterConfig, spec: BaseSpec) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for site in adapted_sites(config, spec):
        a, b = lora_names(spec, site)
        inputs, outputs = spec.modules[site[1]]
        shapes |= {a: (config.r, inputs), b: (outputs, config.r)}
    return shapes


def gate_stems(molex: MolexConfig) -> dict[int, str]:
    """The name that the gate tensors of each mixed depth start with."""
    if molex.gate.scope == "shared":
        return dict.fromkeys(molex.mixed_depths, "molex.gate")
    return {depth: f"molex.gate.{depth}" for depth in molex.mixed_depths}


def gate_shapes(gate: GateConfig, spec: BaseSpec) -> dict[str, Shape]:
    layers, size = spec.num_layers, spec.hidden_size
    if gate.kind == "linear":
        return {"weight": (layers, size), "bias": (layers,)}
    assert gate.projection_dim is not None
    return {
        "projector.weight": (gate.projection_dim, size),
        "projector.bias": (gate.projection_dim,),
        "similarity": (gate.projection_dim, layers),
        "temperature": (1,),
    }


def molex_shapes(molex: MolexConfig, spec: BaseSpec) -> dict[str, Shape]:
    stems = dict.fromkeys(gate_stems(molex).values())
    gates = {f"{stem}.{k}": shape for stem in stems for k, shape in gate_shapes(molex.gate, spec).items()}
    return gates | {MIX: (len(molex.mixed_depths), 2)}


def tensor_shapes(
    config: AdapterConfig, spec: BaseSpec, num_labels: int, *, pooler: bool
) -> dict[str, Shape]:
    """Name and shape of every tensor that an adapter with this configuration must have, and no other."""
    shapes = lora_shapes(config, spec)
    if config.molex is not None:
        shapes |= molex_shapes(config.molex, spec)
    if config.task_type == "SEQ_CLS":
        head = head_shapes(spec.head, spec.hidden_size, num_labels, pooler=pooler)
        shapes |= {PEFT_PREFIX + name: shape for name, shape in head.items()}
    return shapes


def assemble(
    config: AdapterConfig,
    spec: BaseSpec,
    tensors: Mapping[str, Tensor],
    *,
    digest: str = "",
    dropout: float = 0.0,
) -> Adapter:
    """Put tensors with the names of `tensor_shapes` together to an adapter. Nothing is copied."""
    updates = {}
    for site in adapted_sites(config, spec):
        a, b = lora_names(spec, site)
        updates[site] = LowRank(tensors[a], tensors[b], config.scaling)
    heads = {
        name.removeprefix(PEFT_PREFIX): tensor
        for name, tensor in tensors.items()
        if not name.startswith("molex.") and ".lora_" not in name
    }
    return Adapter(
        config=config,
        tensors=dict(tensors),
        lora=LoraWeights(updates, dropout),
        gates={} if config.molex is None else _gates(config.molex, tensors),
        head=Head(spec.head, heads) if config.task_type == "SEQ_CLS" else None,
        digest=digest,
    )


def _gates(molex: MolexConfig, tensors: Mapping[str, Tensor]) -> dict[int, Gate]:
    built: dict[str, Gate] = {}
    for stem in gate_stems(molex).values():
        if stem not in built:
            built[stem] = _gate(
                molex.gate, {k: t for k, t in tensors.items() if k.startswith(stem + ".")}, stem
            )
    return {depth: built[stem] for depth, stem in gate_stems(molex).items()}


def _gate(config: GateConfig, tensors: Mapping[str, Tensor], stem: str) -> Gate:
    if config.kind == "linear":
        return LinearGate(tensors[f"{stem}.weight"], tensors[f"{stem}.bias"])
    return CosineGate(
        tensors[f"{stem}.projector.weight"],
        tensors[f"{stem}.projector.bias"],
        tensors[f"{stem}.similarity"],
        tensors[f"{stem}.temperature"],
        config.normalize,
    )


def new_adapter(
    spec: BaseSpec,
    config: AdapterConfig,
    *,
    num_labels: int = 0,
    mix: tuple[float, float] = (0.95, 0.05),
    seed: int,
    device: torch.device | str = "cpu",
) -> Adapter:
    """An adapter to train: float32 leaves. `mix` is the fixed pair, or where a learned one starts.

    As in PEFT, A is Kaiming uniform and B zero, so that training starts from the base model's own output.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in tensor_shapes(config, spec, num_labels, pooler=True).items():
        tensors[name] = _initial(name, shape, generator).to(device).requires_grad_()
    if config.molex is not None:
        del tensors[MIX]
        tensors |= _initial_mix(config.molex, mix, device)
    return assemble(config, spec, tensors, dropout=config.lora_dropout)


def _initial(name: str, shape: Shape, generator: torch.Generator) -> Tensor:
    if name.endswith((".lora_B.weight", ".bias")):
        return torch.zeros(shape)
    if name.endswith(".temperature"):
        return torch.full(shape, math.log(1 / 0.07))
    if name.endswith(".lora_A.weight"):
        bound = 1 / math.sqrt(shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return torch.empty(shape).normal_(std=0.02, generator=generator)


def _initial_mix(
    molex: MolexConfig, pair: tuple[float, float], device: torch.device | str
) -> dict[str, Tensor]:
    depths = len(molex.mixed_depths)
    if molex.mix == "fixed":
        return {MIX: torch.tensor(pair, device=device).repeat(depths, 1)}
    rows = 1 if molex.mix_scope == "shared" else depths
    logits = torch.tensor(pair, device=device).log().repeat(rows, 1)
    return {MIX_LOGITS: logits.requires_grad_()}
