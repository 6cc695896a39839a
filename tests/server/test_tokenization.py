"""Tokens of a request are those that the base's tokenizer gives."""

from __future__ import annotations

import pytest
from transformers import BatchEncoding

from molex import MolexModel
from molex.tokenizer import load_tokenizer
from server.tokenization import Prompt, Tokenization
from tests.tiny import tiny_base

INPUTS = ["w1 w2", "w3", ["w1", "w2 w3"], ["w1 w2", ""], ["w4 </s> w5", "w6"], "w1 " * 40]


def whole(encoding: BatchEncoding) -> Prompt:
    return Prompt(encoding["input_ids"], encoding.get("token_type_ids"))


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_texts_and_pairs_have_the_tokens_of_the_tokenizer(family, tmp_path):
    folder = tiny_base(family, tmp_path / family)
    spec = MolexModel.from_pretrained(folder).spec
    tokenizer = load_tokenizer(folder, spec)
    prompts = Tokenization.from_pretrained(str(folder), spec, max_length=512).encode(INPUTS, "input")
    texts = [[text] if isinstance(text, str) else text for text in INPUTS]
    assert prompts == [whole(tokenizer(*text)) for text in texts]
    assert (prompts[2].token_type_ids is not None) == (spec.token_types > 1)


class Written:
    """A tokenizer written in Python, which has no other behind it."""

    is_fast = False

    def __call__(self, text: str, pair: str = "", **_: object) -> dict[str, list[int]]:
        return {"input_ids": list(map(ord, text + pair))}


def test_a_tokenizer_without_a_fast_one_behind_it_is_asked_itself():
    tokenization = Tokenization(Written(), max_length=16, vocab_size=128, stop_ids=frozenset())
    assert tokenization.encode(["ab", ["a", "c"]], "input") == [Prompt([97, 98]), Prompt([97, 99])]
