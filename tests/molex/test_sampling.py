from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from molex.errors import InputError
from molex.sampling import (
    FIRST_CANDIDATES,
    SampledToken,
    SamplingParams,
    logit_rows,
    new_generator,
    new_processor,
)

LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0])


def params(**changes) -> SamplingParams:
    return SamplingParams(max_tokens=1, **changes)


def sample(logits, params, generator, processor=None) -> SampledToken:
    return logit_rows([logits])[0].sample(params, generator, processor)


def draws(count: int, logits=LOGITS, *, seed=0, **changes) -> list[int]:
    generator = new_generator(seed)
    return [sample(logits, params(**changes), generator).token_id for _ in range(count)]


def test_temperature_zero_takes_the_most_likely_token():
    assert set(draws(20, temperature=0.0)) == {1}


def test_a_seed_makes_draws_reproducible_and_none_does_not():
    wide = torch.zeros(1000)
    assert draws(20, wide, seed=7) == draws(20, wide, seed=7)
    assert draws(20, wide, seed=7) != draws(20, wide, seed=8)
    assert draws(20, wide, seed=None) != draws(20, wide, seed=None)


def test_draws_follow_the_softmax():
    count = 20_000
    frequencies = torch.bincount(torch.tensor(draws(count)), minlength=4) / count
    # Four standard deviations of a frequency are at most 4 · sqrt(0.25 / 20000) = 0.015.
    assert torch.allclose(frequencies, LOGITS.softmax(-1), atol=0.015)


def test_top_k_keeps_the_best_tokens():
    assert set(draws(200, top_k=2)) == {1, 2}


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    assert set(draws(300, probs.log(), top_p=0.49)) == {0}
    assert set(draws(300, probs.log(), top_p=0.51)) == {0, 1}
    assert set(draws(300, probs.log(), top_p=0.9)) == {0, 1, 2}


def test_top_p_counts_within_what_top_k_left():
    # Of the best two, 0.4 and 0.3, the first has 0.57.
    probs = torch.tensor([0.4, 0.3, 0.3])
    assert set(draws(300, probs.log(), top_k=2, top_p=0.55)) == {0}


def test_a_nucleus_wider_than_the_first_candidates_is_complete():
    wide = torch.zeros(4 * FIRST_CANDIDATES)
    drawn = draws(3000, wide, top_p=0.999)
    assert len(set(drawn)) > 2 * FIRST_CANDIDATES


def test_min_p_keeps_what_has_that_share_of_the_best():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    assert set(draws(300, probs.log(), min_p=0.61)) == {0}
    assert set(draws(300, probs.log(), min_p=0.59)) == {0, 1}
    assert set(draws(300, probs.log(), min_p=0.29, top_k=2)) == {0, 1}
    # At temperature 2 the shares are the square roots.
    assert set(draws(300, probs.log(), min_p=0.5, temperature=2.0)) == {0, 1, 2}


VOCAB = 12
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=20)


def changed(logits, prompt, output, how):
    """The definition of penalties and biases, token by token."""
    values = []
    for token, logit in enumerate(logits):
        if token in prompt + output:
            logit = logit / how.repetition_penalty if logit > 0 else logit * how.repetition_penalty
        logit += how.logit_bias.get(token, 0.0)
        logit -= how.frequency_penalty * output.count(token)
        logit -= how.presence_penalty * (token in output)
        values.append(logit)
    return values


@given(
    st.lists(st.floats(-20, 20), min_size=VOCAB, max_size=VOCAB),
    TOKENS,
    TOKENS,
    st.builds(
        params,
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
        repetition_penalty=st.floats(0.5, 3),
        logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100)),
    ),
)
def test_a_processor_does_what_its_definition_says(logits, prompt, output, how):
    processor = new_processor(how, prompt, VOCAB)
    if processor is None:
        assert changed(logits, prompt, output, how) == logits
        return
    for token in output:
        processor.accept(token)
    processed = processor.process(torch.tensor(logits, dtype=torch.float32)).tolist()
    assert processed == pytest.approx(changed(logits, prompt, output, how), abs=1e-4)


def test_sampling_tells_its_processor_what_came():
    # Each token costs 1 the first time that it comes, and so makes room for the next best.
    how = params(temperature=0.0, presence_penalty=1.5)
    processor = new_processor(how, [], len(LOGITS))
    drawn = [sample(LOGITS, how, new_generator(0), processor).token_id for _ in range(4)]
    assert drawn == [1, 2, 1, 1]


def test_a_bias_outside_the_vocabulary_is_refused():
    with pytest.raises(InputError, match="logit_bias must be of tokens 0 to 11, got"):
        new_processor(params(logit_bias={12: 1.0}), [], VOCAB)


def test_a_tiny_temperature_is_finite():
    assert set(draws(20, temperature=1e-40)) == {1}


def test_log_probabilities_are_those_of_the_model():
    expected = LOGITS.log_softmax(-1)
    sampled = sample(LOGITS, params(temperature=0.0, top_k=1, logprobs=2), new_generator(0))
    assert sampled.logprob == pytest.approx(float(expected[1]))
    assert [token for token, _ in sampled.top] == [1, 2]
    assert [logprob for _, logprob in sampled.top] == pytest.approx(expected[[1, 2]].tolist())


def test_log_probabilities_are_reported_only_on_demand():
    assert sample(LOGITS, params(), new_generator(0)).logprob is None
    assert sample(LOGITS, params(logprobs=0), new_generator(0)).top == ()


@given(
    st.lists(st.floats(-50, 50), min_size=1, max_size=40),
    st.floats(0, 2),
    st.floats(0.01, 1),
    st.integers(0, 50),
)
def test_every_draw_is_a_token(values, temperature, top_p, top_k):
    chosen = draws(1, torch.tensor(values), temperature=temperature, top_p=top_p, top_k=top_k)[0]
    assert 0 <= chosen < len(values)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.1),
        ("presence_penalty", math.inf),
        ("frequency_penalty", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-110),
        ("repetition_penalty", math.nan),
        ("logit_bias", {3: math.nan}),
        ("stop", ("",)),
        ("logprobs", -1),
    ],
)
def test_values_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(InputError, match=field):
        SamplingParams(**{"max_tokens": 1, field: value})


def test_requests_side_by_side_are_sampled_as_alone():
    logits = [torch.randn(50, generator=new_generator(n)) for n in range(4)]
    choices = [params(temperature=0.0, logprobs=3), params(), params(top_k=3, logprobs=1), params(top_p=0.5)]
    together = [
        row.sample(how, new_generator(n))
        for n, (row, how) in enumerate(zip(logit_rows(logits), choices, strict=True))
    ]
    alone = [
        sample(own, how, new_generator(n)) for n, (own, how) in enumerate(zip(logits, choices, strict=True))
    ]
    assert together == alone
    assert logit_rows([]) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_with_broken_numbers_is_known(bad, dtype):
    good = torch.full((50_000,), 3e4, dtype=dtype)
    broken = good.clone()
    broken[7] = bad
    assert [row.finite for row in logit_rows([good, broken, good])] == [True, False, True]


def test_of_equal_logits_the_first_is_taken():
    logits = torch.zeros(50_000, dtype=torch.bfloat16)
    logits[[9, 30_000]] = 1
    assert draws(1, logits, temperature=0.0) == [9]
