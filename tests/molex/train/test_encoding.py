"""Tokenization: templates, votes, truncation."""

import pytest

from molex.train.data import DataError, Dataset, LabelledText, PromptText
from molex.train.encoding import encode_labelled, encode_prompt, encode_prompts

BOS, EOS = 1, 2


def dataset(*examples):
    return Dataset("data.tsv", "sha256:0", examples, tuple(range(2, 2 + len(examples))))


def word(number):
    return number + 4


def test_pairs_go_through_the_tokenizers_template(encoder):
    data = dataset(LabelledText("w1 w2", "a"), LabelledText("w1", "b", text_pair="w3"))
    single, pair = encode_labelled(encoder.tokenizer, data, [0, 1], 20).items
    assert list(single.token_ids) == [BOS, word(1), word(2)]
    assert list(pair.token_ids) == [BOS, word(1), EOS, word(3)]
    assert (single.label, pair.label) == (0, 1)
    assert single.prompt_length is None


def test_token_types_come_from_the_tokenizer(encoder):
    data = dataset(LabelledText("w1", "a", text_pair="w3"))
    (item,) = encode_labelled(encoder.tokenizer, data, [0], 20).items
    if item.token_type_ids is not None:
        assert list(item.token_type_ids) == [0, 0, 0, 1]


def test_long_texts_are_cut_and_counted(encoder):
    data = dataset(LabelledText("w1 " * 9, "a"), LabelledText("w1", "a"))
    encoded = encode_labelled(encoder.tokenizer, data, [0, 0], 5)
    assert [len(item.token_ids) for item in encoded.items] == [5, 2]
    assert encoded.truncated == 1
    assert encoded.num_tokens == 7


def test_each_reference_is_an_item_that_ends_with_eos(decoder):
    data = dataset(PromptText("w1 w2", ("w3", "w4 w5")))
    first, second = encode_prompts(decoder.tokenizer, data, 20).items
    prompt = encode_prompt(decoder.tokenizer, "w1 w2")
    assert list(first.token_ids) == [*prompt, word(3), EOS]
    assert list(second.token_ids) == [*prompt, word(4), word(5), EOS]
    assert first.prompt_length == second.prompt_length == len(prompt)


def test_long_completions_lose_their_end(decoder):
    data = dataset(PromptText("w1", ("w3 w4 w5",)))
    encoded = encode_prompts(decoder.tokenizer, data, 4)
    assert list(encoded.items[0].token_ids) == [BOS, word(1), word(3), word(4)]
    assert encoded.truncated == 1


def test_a_prompt_without_room_is_refused_by_place(decoder):
    data = dataset(PromptText("w1", ("w3",)), PromptText("w1 w2 w3", ("w3",)))
    with pytest.raises(DataError, match=r"data.tsv, line 3, column 'prompt': 4 tokens"):
        encode_prompts(decoder.tokenizer, data, 4)
