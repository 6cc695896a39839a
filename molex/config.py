"""What an adapter says about itself: the choices of MoLEx and of LoRA.

MoLEx is "Mixture of Layer Experts" (Teo and Nguyen, ICLR 2025, arXiv 2503.11144); `docs/method.md` gives
the equations that these fields choose between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

GateKind = Literal["linear", "cosine"]
Scope = Literal["shared", "depth"]
Axis = Literal["features", "sequence"]
VoteRule = Literal["mode", "mean"]
VoteScore = Literal["softmax", "sigmoid"]
VoteOver = Literal["sequence", "prompt"]
GateGradient = Literal["none", "straight_through"]
MixKind = Literal["fixed", "learned"]
TaskType = Literal["SEQ_CLS", "CAUSAL_LM"]
ProblemType = Literal["single_label_classification", "regression"]


@dataclass(frozen=True)
class GateConfig:
    """How a gate turns the hidden state of a token into one logit per layer."""

    kind: GateKind = "linear"
    scope: Scope = "shared"
    """One gate for all mixed depths, or one for each."""
    projection_dim: int | None = None
    """Width P of the cosine gate's projection; None for a linear gate."""
    normalize: Axis = "features"
    """Axis that the cosine gate normalises its projection along; `sequence` as in the official code."""


@dataclass(frozen=True)
class VoteConfig:
    """How the tokens of one request agree on a layer."""

    rule: VoteRule = "mode"
    """`mode`: the most frequent argmax, ties to the smallest index. `mean`: the largest mean score."""
    score: VoteScore = "softmax"
    """The score that `mean` averages."""
    over: VoteOver = "sequence"
    """Which tokens were given the vote in training: all of them, or those of the prompt."""


@dataclass(frozen=True)
class MolexConfig:
    """The mixture of layers: which depths mix, how the second layer is picked, how the two are mixed."""

    mixed_depths: tuple[int, ...]
    gate: GateConfig = field(default_factory=GateConfig)
    vote: VoteConfig = field(default_factory=VoteConfig)
    top_k: Literal[1, 2] = 1
    gate_gradient: GateGradient = "none"
    """Whether the task loss reaches the gate in training (`straight_through`) or not (`none`)."""
    mix: MixKind = "fixed"
    mix_scope: Scope = "shared"


@dataclass(frozen=True)
class AdapterConfig:
    """What `adapter_config.json` says: PEFT's LoRA fields and, for MoLEx, the mixture."""

    task_type: TaskType
    r: int
    lora_alpha: float
    target_modules: tuple[str, ...]
    lora_dropout: float = 0.0
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    """PEFT's note that the base keeps its weights as [in, out], as GPT-2 does. The factors are the same."""
    layers_to_transform: tuple[int, ...] | None = None
    problem_type: ProblemType = "single_label_classification"
    """What the logits of a head are: scores of labels, or one number that is the answer itself."""
    molex: MolexConfig | None = None
    base_model_name_or_path: str = ""
    id2label: Mapping[int, str] | None = None

    @property
    def kind(self) -> Literal["lora", "molex"]:
        return "lora" if self.molex is None else "molex"

    @property
    def regression(self) -> bool:
        return self.problem_type == "regression"

    @property
    def scaling(self) -> float:
        """Factor on the low-rank product: lora_alpha / r, or / sqrt(r) for rank-stabilised LoRA."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)
