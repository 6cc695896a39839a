"""Every item is in exactly one batch."""

from hypothesis import given
from hypothesis import strategies as st

from molex.train.batches import shuffled_batches, token_batches

lengths = st.lists(st.integers(1, 50), min_size=1, max_size=200)


@given(lengths, st.integers(1, 16), st.integers(0, 3))
def test_an_epoch_holds_every_item_once(lengths, batch_size, epoch):
    batches = shuffled_batches(lengths, batch_size, seed=0, epoch=epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // batch_size)
    assert all(len(batch) <= batch_size for batch in batches)


def test_the_order_depends_on_seed_and_epoch_alone():
    lengths = [5, 9, 2] * 40
    assert shuffled_batches(lengths, 4, 0, 1) == shuffled_batches(lengths, 4, 0, 1)
    assert shuffled_batches(lengths, 4, 0, 1) != shuffled_batches(lengths, 4, 0, 2)
    assert shuffled_batches(lengths, 4, 0, 1) != shuffled_batches(lengths, 4, 1, 1)


@given(lengths, st.integers(1, 120))
def test_token_batches_keep_to_the_budget(lengths, max_tokens):
    batches = token_batches(lengths, max_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[index] for index in batch) <= max_tokens
