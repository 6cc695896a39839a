"""Task heads: from the hidden state of a request's pooled token to one logit per label."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

HeadKind = Literal["roberta", "bert", "score"]
Shape = tuple[int, ...]

POOLER = "bert.pooler.dense"


def head_shapes(kind: HeadKind, hidden_size: int, num_labels: int, *, pooler: bool) -> dict[str, Shape]:
    """Names, as PEFT saves them, and shapes of the tensors of a head.

    `pooler` says whether a BERT head brings a pooler of its own instead of using the base model's.
    """
    square, labels = (hidden_size, hidden_size), (num_labels, hidden_size)
    if kind == "score":
        return {"score.weight": labels}
    if kind == "roberta":
        return {
            "classifier.dense.weight": square,
            "classifier.dense.bias": (hidden_size,),
            "classifier.out_proj.weight": labels,
            "classifier.out_proj.bias": (num_labels,),
        }
    own_pooler = {f"{POOLER}.weight": square, f"{POOLER}.bias": (hidden_size,)} if pooler else {}
    return own_pooler | {"classifier.weight": labels, "classifier.bias": (num_labels,)}


def output_name(kind: HeadKind) -> str:
    """The tensor whose first dimension is the number of labels."""
    return {
        "score": "score.weight",
        "roberta": "classifier.out_proj.weight",
        "bert": "classifier.weight",
    }[kind]


@dataclass(frozen=True)
class Head:
    """A classification head over hidden states of size d, with C labels."""

    kind: HeadKind
    tensors: Mapping[str, Tensor]

    @property
    def num_labels(self) -> int:
        return len(self.tensors[output_name(self.kind)])

    @property
    def pools_first_token(self) -> bool:
        """Encoders pool the first token, decoders the last."""
        return self.kind != "score"

    def logits(self, pooled: Tensor, base_pooler: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Logits [m, C] for the pooled tokens' hidden states [m, d], in the head's own precision.

        `base_pooler` is the base model's, for BERT heads that bring none.
        """
        if self.kind == "bert" and f"{POOLER}.weight" not in self.tensors:
            assert base_pooler is not None, "the adapter reader refuses this head on a base without pooler"
            return self._linear("classifier", base_pooler(pooled))
        pooled = pooled.to(self.tensors[output_name(self.kind)].dtype)
        if self.kind == "score":
            return functional.linear(pooled, self.tensors["score.weight"])
        if self.kind == "bert":
            return self._linear("classifier", torch.tanh(self._linear(POOLER, pooled)))
        return self._linear("classifier.out_proj", torch.tanh(self._linear("classifier.dense", pooled)))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        weight = self.tensors[f"{name}.weight"]
        return functional.linear(x.to(weight.dtype), weight, self.tensors[f"{name}.bias"])
