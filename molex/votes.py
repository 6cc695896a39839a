"""Votes: the tokens of each request agree on layers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from molex.config import VoteConfig


@dataclass(frozen=True)
class Ballots:
    """Gate logits [n, T] of voting tokens, and the request 0..v-1 that each of them belongs to."""

    logits: Tensor
    owners: Tensor
    num_requests: int

    @cached_property
    def first_choices(self) -> Tensor:
        """The layer [n] with each token's largest logit, the smallest index where several have it."""
        return self.logits.argmax(dim=-1)

    @cached_property
    def counts(self) -> Tensor:
        """How many tokens [v, T] of each request have each layer as first choice."""
        num_layers = self.logits.shape[1]
        cells = self.owners * num_layers + self.first_choices
        # Not `bincount`, which waits for a GPU to know how many it has to count.
        counts = cells.new_zeros(self.num_requests * num_layers).index_add_(0, cells, torch.ones_like(cells))
        return counts.view(self.num_requests, num_layers)

    @cached_property
    def probabilities(self) -> Tensor:
        """The softmax of the logits averaged over the tokens of each request [v, T]."""
        return self.mean(self.logits.softmax(dim=-1))

    def mean(self, values: Tensor) -> Tensor:
        """Values [n, T] averaged over the tokens of each request [v, T]."""
        sums = values.new_zeros(self.num_requests, values.shape[1]).index_add_(0, self.owners, values)
        voters = self.owners.new_zeros(self.num_requests)
        return sums / voters.index_add_(0, self.owners, torch.ones_like(self.owners))[:, None]


@dataclass(frozen=True)
class Election:
    """The k layers [v, k] that each request chose, most votes first, and their weights [v, k], of sum 1."""

    layers: Tensor
    weights: Tensor


def elect(ballots: Ballots, vote: VoteConfig, top_k: int) -> Election:
    """Let the tokens of each request vote.

    With `mode` a layer's score is the number of tokens whose largest logit it has, with `mean` its score
    averaged over the tokens. The k layers with the largest scores win, ties to the smallest index.
    """
    if vote.rule == "mode":
        scores = ballots.counts
    elif vote.score == "softmax":
        scores = ballots.probabilities
    else:
        scores = ballots.mean(ballots.logits.sigmoid())
    layers = scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    if top_k == 1:
        return Election(layers, ballots.logits.new_ones(layers.shape))
    return Election(layers, _shares(ballots.probabilities.detach().gather(1, layers)))


def _shares(chosen: Tensor) -> Tensor:
    """Probabilities [v, k] scaled to sum to 1; even shares where all of them are too small for a float."""
    total = chosen.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, chosen / total, torch.full_like(chosen, 1 / chosen.shape[1]))


def load_balance(ballots: Ballots) -> Tensor:
    """T · Σ_e f_e · p̄_e: f_e the share of voting tokens whose argmax is layer e, p̄_e its mean probability.

    Least, 1, where the layers are chosen evenly (the auxiliary loss of Switch Transformers, Fedus et al.
    2021, eq. 4). The mean probability is taken over requests.
    """
    shares = ballots.counts.sum(dim=0) / len(ballots.owners)
    return ballots.logits.shape[1] * (shares * ballots.probabilities.mean(dim=0)).sum()
