"""Metrics against values worked out by hand."""

import math

import pytest

from molex.train.metrics import (
    classification_metrics,
    generation_metrics,
    is_better,
    perplexity,
    regression_metrics,
)


def test_two_classes():
    metrics = classification_metrics([1, 1, 0, 0], [1, 0, 0, 0])
    assert metrics["accuracy"] == 0.75
    assert metrics["f1"] == pytest.approx(2 / 3)
    assert metrics["f1_macro"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert metrics["matthews"] == pytest.approx(1 / math.sqrt(3))


def test_more_classes_have_no_binary_f1():
    metrics = classification_metrics([0, 1, 2], [0, 1, 2])
    assert metrics == {"accuracy": 1.0, "matthews": 1.0, "f1_macro": 1.0}


def test_one_predicted_class_has_no_correlation():
    assert classification_metrics([1, 1], [1, 0])["matthews"] == 0.0


def test_correlations():
    metrics = regression_metrics([1.0, 2.0, 4.0], [0.0, 1.0, 2.0])
    assert metrics["pearson"] == pytest.approx(3 / math.sqrt(2 * 14 / 3))
    assert metrics["spearman"] == pytest.approx(1.0)
    assert regression_metrics([3.0, 2.0, 1.0], [1.0, 2.0, 9.0])["spearman"] == pytest.approx(-1.0)


def test_what_does_not_vary_has_no_correlation():
    assert regression_metrics([1.0, 1.0], [1.0, 2.0]) == {"pearson": 0.0, "spearman": 0.0}


def test_perplexity():
    assert perplexity(math.log(8) * 3, 3) == pytest.approx(8)
    assert perplexity(1e6, 1) == math.inf


def test_generation_takes_the_best_of_a_varying_number_of_references():
    texts = ["the cat sat on the mat", "a dog ran in the park"]
    references = [["no match here at all", texts[0]], [texts[1]]]
    metrics = generation_metrics(texts, references)
    assert metrics["bleu"] == pytest.approx(100)
    assert metrics["chrf"] == pytest.approx(100)
    assert generation_metrics(["other", "words"], references)["bleu"] < 5


def test_better_is_higher_but_for_losses():
    assert is_better("accuracy", 0.5, None)
    assert is_better("accuracy", 0.5, 0.4)
    assert not is_better("accuracy", 0.5, 0.5)
    assert is_better("perplexity", 3.0, 4.0)
    assert not is_better("perplexity", math.nan, 4.0)
