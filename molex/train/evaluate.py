"""Evaluation of an adapter on a data file."""

from collections.abc import Sequence
from typing import Any

import torch

from molex.adapter import Adapter
from molex.generate import generate
from molex.model import MolexModel
from molex.sampling import SamplingParams
from molex.train.batches import token_batches
from molex.train.data import Dataset, PromptText
from molex.train.encoding import Item, encode_prompt
from molex.train.loss import make_rows, prediction_loss
from molex.train.metrics import (
    Metrics,
    classification_metrics,
    generation_metrics,
    perplexity,
    regression_metrics,
)

# Large enough to fill the linear layers, small enough for [tokens, vocab] logits in memory.
MAX_BATCH_TOKENS = 1024


@torch.inference_mode()
def evaluate_items(model: MolexModel, adapter: Adapter, items: Sequence[Item]) -> Metrics:
    """The metrics that one forward over the items gives.

    SEQ_CLS: mean loss and the metrics of classification or regression. CAUSAL_LM: mean loss per
    completion token and perplexity, over every completion or reference.
    """
    predicted: list[Any] = [0] * len(items)
    total, count = 0.0, 0
    for batch in token_batches([len(item.token_ids) for item in items], MAX_BATCH_TOKENS):
        chosen = [items[index] for index in batch]
        output = model.run(make_rows(adapter, chosen), lm_logits="all")
        losses = prediction_loss(adapter, output.logits, chosen)
        total += float(losses.double().sum())
        count += len(losses)
        if adapter.task_type == "SEQ_CLS":
            for index, logits in zip(batch, output.logits, strict=True):
                predicted[index] = float(logits) if adapter.regression else int(logits.argmax())
    metrics: Metrics = {"loss": total / count}
    if adapter.task_type == "CAUSAL_LM":
        return metrics | {"perplexity": perplexity(total, count)}
    labels: list[Any] = [item.label for item in items]
    measure = regression_metrics if adapter.regression else classification_metrics
    return metrics | measure(predicted, labels)


def evaluate_generation(
    model: MolexModel,
    adapter: Adapter,
    tokenizer: Any,
    dataset: Dataset[PromptText],
    max_tokens: int,
) -> Metrics:
    """BLEU and chrF of greedy continuations against the references of each prompt."""
    prompts = [encode_prompt(tokenizer, example.prompt) for example in dataset.examples]
    params = SamplingParams(max_tokens=max_tokens, temperature=0)
    stop_ids = {tokenizer.eos_token_id}
    generated = generate(model, prompts, adapter, params, stop_ids=stop_ids)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in generated]
    return generation_metrics(texts, [example.completions for example in dataset.examples])
