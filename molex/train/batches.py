"""Batches: which items run together, and in which order."""

import random
from collections.abc import Sequence

# Batches whose items are sorted by length together: long enough to group well, short enough to
# keep an epoch's order random.
GROUPED_BATCHES = 16

Batch = list[int]  # indices of items


def shuffled_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[Batch]:
    """One epoch of batches of similar lengths, in random order.

    The order depends on nothing but the arguments: training that resumes in the middle of an epoch
    finds the same batches again.
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    pool = batch_size * GROUPED_BATCHES
    grouped = [
        index
        for start in range(0, len(order), pool)
        for index in sorted(order[start : start + pool], key=lengths.__getitem__)
    ]
    batches = [grouped[start : start + batch_size] for start in range(0, len(grouped), batch_size)]
    rng.shuffle(batches)
    return batches


def token_batches(lengths: Sequence[int], max_tokens: int) -> list[Batch]:
    """All items by ascending length, each batch holding at most `max_tokens` tokens.

    An item longer than that runs alone.
    """
    batches: list[Batch] = []
    tokens = max_tokens
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if tokens + lengths[index] > max_tokens or not batches:
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += lengths[index]
    return batches
