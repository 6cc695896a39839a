"""The votes of requests, counted by the kernels."""

from __future__ import annotations

import torch

from molex.config import VoteConfig
from molex.votes import Ballots, Election


def elect(ballots: Ballots, vote: VoteConfig, top_k: int) -> Election:
    """See `molex.votes.elect`; in float32, and without gradients."""
    score = vote.rule if vote.rule == "mode" else vote.score
    logits, owners = ballots.logits.float(), ballots.owners
    return Election(*torch.ops.molex.elect.default(logits, owners, ballots.num_requests, score, top_k))
