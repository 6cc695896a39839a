import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from scripts.e5_reader import dequantise, read_e5
from tests.scripts.e5_files import FLOAT32, PIECES, SCORES, e5_bytes, quantise, tiny_tensors

WHOLE = e5_bytes(tiny_tensors())


def test_header_pieces_and_scores_are_read():
    e5 = read_e5(WHOLE)
    assert (e5.header.hidden, e5.header.layers, e5.header.vocabulary) == (32, 2, len(PIECES))
    assert (e5.header.bos, e5.header.eos, e5.header.pad, e5.header.unk) == (0, 2, 1, 3)
    assert e5.header.layer_norm_eps == 1e-12
    assert e5.pieces == PIECES
    assert e5.scores == SCORES


def test_float_tensors_are_read_exactly_and_quantised_ones_closely():
    tensors = tiny_tensors()
    read = read_e5(WHOLE).tensors
    assert read.keys() == tensors.keys()
    for name, (kind, values) in tensors.items():
        step = 0 if kind == FLOAT32 else np.abs(values).max() / 7
        np.testing.assert_allclose(read[name], values.reshape(-1), atol=step * 0.51, rtol=0)


def test_low_nibbles_come_first():
    quants = np.arange(32, dtype=np.uint8) % 16
    block = np.float16(0.5).tobytes() + (quants[:16] | (15 - quants[16:]) << 4).tobytes()
    values = dequantise(block)
    np.testing.assert_array_equal(values[:16], (np.arange(16) - 8) * 0.5)
    np.testing.assert_array_equal(values[16:], (7 - np.arange(16)) * 0.5)


@given(
    hnp.arrays(np.int8, (3, 32), elements=st.integers(-7, 7)),
    st.floats(2**-10, 2.0, width=16),
)
def test_whole_steps_survive_quantisation_exactly(steps, scale):
    steps[:, 0] = 7  # fixes the scale that the writer derives
    values = steps.astype(np.float32) * np.float32(scale)
    np.testing.assert_array_equal(dequantise(quantise(values)), values.reshape(-1))


@given(st.integers(0, len(WHOLE) - 1))
def test_a_file_cut_anywhere_is_refused(length):
    with pytest.raises(ValueError, match=r"file ends inside|does not fit"):
        read_e5(WHOLE[:length])


def test_another_magic_is_refused():
    with pytest.raises(ValueError, match="starts with b'GGUF'"):
        read_e5(b"GGUF" + WHOLE[4:])


def test_another_block_length_is_refused():
    with pytest.raises(ValueError, match="blocks of 64 values"):
        read_e5(e5_bytes(tiny_tensors(), block=64))


def test_an_unknown_tensor_kind_is_refused_by_name():
    data = WHOLE.replace(b"emb.pos\x00", b"emb.pos\x07")
    with pytest.raises(ValueError, match=r"'emb.pos': kind 7"):
        read_e5(data)
