"""Task heads against those of transformers, and the names and shapes of their tensors."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, RobertaConfig
from transformers.models.bert.modeling_bert import BertPooler
from transformers.models.roberta.modeling_roberta import RobertaClassificationHead

from molex.heads import Head, head_shapes, output_name

HIDDEN, LABELS = 8, 3


def head(kind, *, pooler=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = head_shapes(kind, HIDDEN, LABELS, pooler=pooler)
    return Head(kind, {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()})


def pooled(count=4):
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(2))


def test_roberta_head_is_that_of_transformers():
    config = RobertaConfig(
        hidden_size=HIDDEN, num_attention_heads=2, num_labels=LABELS, classifier_dropout=0.0
    )
    stock = RobertaClassificationHead(config).eval()
    state = {f"classifier.{name}": tensor.detach() for name, tensor in stock.state_dict().items()}
    expected = stock(pooled()[:, None])
    torch.testing.assert_close(Head("roberta", state).logits(pooled()), expected)


def test_bert_head_pools_with_its_own_pooler_or_the_bases():
    own = head("bert")
    stock = BertPooler(BertConfig(hidden_size=HIDDEN, num_attention_heads=2))
    stock.dense.load_state_dict(
        {"weight": own.tensors["bert.pooler.dense.weight"], "bias": own.tensors["bert.pooler.dense.bias"]}
    )
    with torch.no_grad():
        middle = stock(pooled()[:, None])
        expected = middle @ own.tensors["classifier.weight"].T + own.tensors["classifier.bias"]
        torch.testing.assert_close(own.logits(pooled()), expected)
        bare = Head("bert", {k: t for k, t in own.tensors.items() if "pooler" not in k})
        torch.testing.assert_close(bare.logits(pooled(), lambda x: stock(x[:, None])), expected)


def test_an_own_pooler_wins_over_the_bases():
    own = head("bert")
    torch.testing.assert_close(own.logits(pooled(), torch.zeros_like), own.logits(pooled()))


def test_score_head_is_one_matrix():
    score = head("score")
    torch.testing.assert_close(score.logits(pooled()), pooled() @ score.tensors["score.weight"].T)


@pytest.mark.parametrize("kind", ["roberta", "bert", "score"])
def test_heads_compute_in_their_own_precision(kind):
    logits = head(kind).logits(pooled().bfloat16())
    assert logits.dtype == torch.float32
    assert logits.shape == (4, LABELS)


@pytest.mark.parametrize("kind", ["roberta", "bert", "score"])
def test_labels_and_pooled_token(kind):
    one = head(kind)
    assert one.num_labels == LABELS
    assert output_name(kind) in one.tensors
    assert one.pools_first_token == (kind != "score")


def test_shapes_by_the_names_that_peft_saves():
    names = {kind: list(head_shapes(kind, HIDDEN, LABELS, pooler=False)) for kind in ("bert", "score")}
    assert names == {"bert": ["classifier.weight", "classifier.bias"], "score": ["score.weight"]}
    assert head_shapes("bert", HIDDEN, LABELS, pooler=True)["bert.pooler.dense.weight"] == (HIDDEN, HIDDEN)
    assert head_shapes("roberta", HIDDEN, LABELS, pooler=False) == {
        "classifier.dense.weight": (HIDDEN, HIDDEN),
        "classifier.dense.bias": (HIDDEN,),
        "classifier.out_proj.weight": (LABELS, HIDDEN),
        "classifier.out_proj.bias": (LABELS,),
    }
