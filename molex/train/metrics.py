"""Metrics of classification, regression and generation.

Thin wrappers around scikit-learn and sacrebleu (extra `train`), which are imported where they are
used because serving does not need them.
"""

import math
from collections.abc import Sequence
from typing import Any

from molex.errors import MolexError

Metrics = dict[str, float]

CLASSIFICATION = ("accuracy", "matthews", "f1", "f1_macro", "loss")
REGRESSION = ("pearson", "spearman", "loss")
GENERATION = ("perplexity", "bleu", "chrf")
LOWER_IS_BETTER = frozenset({"loss", "perplexity"})


def is_better(metric: str, value: float, best: float | None) -> bool:
    """Whether `value` improves on `best` (None: nothing yet); not-a-number never does."""
    if math.isnan(value):
        return False
    if best is None:
        return True
    return value < best if metric in LOWER_IS_BETTER else value > best


def classification_metrics(predicted: Sequence[int], labels: Sequence[int]) -> Metrics:
    """Accuracy, Matthews correlation and macro F1; with two classes also F1 of class 1."""
    sklearn = _import_sklearn()
    metrics = {
        "accuracy": sklearn.accuracy_score(labels, predicted),
        "matthews": sklearn.matthews_corrcoef(labels, predicted),
        "f1_macro": sklearn.f1_score(labels, predicted, average="macro", zero_division=0.0),
    }
    if set(labels) | set(predicted) <= {0, 1}:
        metrics["f1"] = sklearn.f1_score(labels, predicted, pos_label=1, zero_division=0.0)
    return {name: float(value) for name, value in metrics.items()}


def regression_metrics(predicted: Sequence[float], values: Sequence[float]) -> Metrics:
    """Pearson and Spearman correlation; 0 where one side does not vary."""
    stats = _import_scipy_stats()
    if len(set(predicted)) < 2 or len(set(values)) < 2:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(stats.pearsonr(predicted, values).statistic),
        "spearman": float(stats.spearmanr(predicted, values).statistic),
    }


def perplexity(total_loss: float, num_tokens: int) -> float:
    """exp of the mean negative log-likelihood per token; infinite where that overflows."""
    try:
        return math.exp(total_loss / num_tokens)
    except OverflowError:
        return math.inf


def generation_metrics(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Metrics:
    """Corpus BLEU and chrF (0 to 100) of `texts[i]` against all of `references[i]`."""
    sacrebleu = _import_sacrebleu()
    most = max(len(group) for group in references)
    # sacrebleu wants one stream per reference position; None says that a text has fewer.
    streams = [
        [group[position] if position < len(group) else None for group in references]
        for position in range(most)
    ]
    return {
        # force: no warning that tokenized text was given, which is what the E2E data is.
        "bleu": float(sacrebleu.corpus_bleu(list(texts), streams, force=True).score),
        "chrf": float(sacrebleu.corpus_chrf(list(texts), streams).score),
    }


def _import_sklearn() -> Any:
    try:
        from sklearn import metrics  # noqa: PLC0415 (optional dependency)
    except ImportError as error:
        raise MolexError("metrics need scikit-learn: pip install 'molex-serve[train]'") from error
    return metrics


def _import_scipy_stats() -> Any:
    try:
        from scipy import stats  # noqa: PLC0415 (optional dependency)
    except ImportError as error:
        raise MolexError("correlations need scipy: pip install 'molex-serve[train]'") from error
    return stats


def _import_sacrebleu() -> Any:
    try:
        import sacrebleu  # noqa: PLC0415 (optional dependency)
    except ImportError as error:
        raise MolexError("BLEU needs sacrebleu: pip install 'molex-serve[train]'") from error
    return sacrebleu
