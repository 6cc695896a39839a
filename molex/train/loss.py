"""From items to rows of a packed batch, and from its logits to the loss."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from molex.adapter import Adapter
from molex.row import Row
from molex.train.encoding import Item


def make_rows(adapter: Adapter, items: Sequence[Item]) -> list[Row]:
    """The items as rows of one packed batch; where an item has a prompt, the prompt votes."""
    return [
        Row(
            token_ids=item.token_ids,
            adapter=adapter,
            voters=item.prompt_length,
            token_type_ids=item.token_type_ids,
        )
        for item in items
    ]


def prediction_loss(adapter: Adapter, logits: Sequence[Tensor], items: Sequence[Item]) -> Tensor:
    """The loss of everything that is predicted, [n]: negative log-likelihood, of a regression squared error.

    SEQ_CLS: logits [num_labels] per item, n = items. CAUSAL_LM: logits [length, vocab] per item,
    n = completion tokens of all items.
    """
    if adapter.regression:
        values = torch.tensor([item.label for item in items], dtype=torch.float32)
        predicted = torch.cat(list(logits)).float()
        return functional.mse_loss(predicted, values.to(predicted.device), reduction="none")
    if items[0].prompt_length is None:
        predicted = torch.stack(list(logits))
        targets = [item.label for item in items]
    else:
        starts = [item.prompt_length or 0 for item in items]
        pairs = zip(logits, starts, strict=True)
        predicted = torch.cat([row[start - 1 : -1] for row, start in pairs])
        ends = [item.token_ids[start:] for item, start in zip(items, starts, strict=True)]
        targets = [token for end in ends for token in end]
    labels = torch.tensor(targets, device=predicted.device)
    return functional.cross_entropy(predicted.float(), labels, reduction="none")
