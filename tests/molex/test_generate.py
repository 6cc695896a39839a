"""Offline generation equals choosing the best token of the full forward, step by step."""

import pytest
import torch

from molex import BARE, MolexModel, Row
from molex.errors import InputError
from molex.generate import GREEDY, generate
from molex.sampling import SamplingParams
from tests.tiny import molex_config, random_adapter, random_ids, tiny_base

PROMPTS = [random_ids(length, seed=length) for length in (3, 9, 1, 6, 4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return MolexModel.from_pretrained(tiny_base("llama", tmp_path_factory.mktemp("llama")))


@torch.no_grad()
def slow_greedy(model, prompt, adapter, count):
    tokens = list(prompt)
    for _ in range(count):
        row = Row(tokens, adapter, voters=len(prompt))
        tokens.append(int(model.run([row]).logits[0].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kind", ["bare", "molex"])
def test_equals_the_full_forward(model, kind):
    molex = random_adapter(model.spec, seed=1, task="CAUSAL_LM", molex=molex_config())
    adapter = BARE if kind == "bare" else molex
    params = SamplingParams(max_tokens=6, temperature=0)
    generated = generate(model, PROMPTS, adapter, params, num_slots=2)
    assert generated == [slow_greedy(model, prompt, adapter, 6) for prompt in PROMPTS]


def test_ends_before_a_stop_token(model):
    (whole,) = generate(model, PROMPTS[:1], params=SamplingParams(max_tokens=8, temperature=0))
    stop = whole[3]
    (cut,) = generate(model, PROMPTS[:1], stop_ids={stop})
    assert cut == whole[: whole.index(stop)]


def test_ends_at_the_longest_sequence_of_the_base(model):
    prompt = random_ids(model.spec.max_length - 2, seed=0)
    params = SamplingParams(max_tokens=50, temperature=0, ignore_eos=True)
    (generated,) = generate(model, [prompt], params=params)
    assert len(generated) == 2


def test_a_seed_repeats(model):
    params = SamplingParams(max_tokens=8, seed=3)
    assert generate(model, PROMPTS, params=params) == generate(model, PROMPTS, params=params)


def test_refuses_what_it_cannot_do(model):
    with pytest.raises(InputError, match="prompt 1 has 0 tokens"):
        generate(model, [[5], []])
    with pytest.raises(InputError, match="stop and logprobs"):
        generate(model, [[5]], params=SamplingParams(max_tokens=1, stop=("x",)))
    assert generate(model, [], params=GREEDY) == []
