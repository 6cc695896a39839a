import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, RobertaModel

from scripts.e5_base import convert
from scripts.e5_reader import read_e5
from tests.scripts.e5_files import HIDDEN, e5_bytes, tiny_tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("e5")
    (root / "tiny.bin").write_bytes(e5_bytes(tiny_tensors()))
    convert(root / "tiny.bin", root / "model")
    return root / "model"


def test_every_tensor_reaches_its_place(folder):
    model = RobertaModel.from_pretrained(folder, add_pooling_layer=False)
    e5 = read_e5((folder.parent / "tiny.bin").read_bytes()).tensors
    query = model.encoder.layer[1].attention.self.query.weight
    np.testing.assert_array_equal(query.detach().reshape(-1), e5["l1.q.w"])
    down = model.encoder.layer[0].output.dense.weight
    assert down.shape == (32, 64)
    np.testing.assert_array_equal(down.detach().reshape(-1), e5["l0.fo.w"])


def test_two_zero_rows_stand_before_the_positions(folder):
    model = RobertaModel.from_pretrained(folder, add_pooling_layer=False)
    positions = model.embeddings.position_embeddings.weight
    assert positions.shape == (8 + 2, HIDDEN)
    assert not positions[:2].any()
    assert positions[2:].all()
    assert model.embeddings.token_type_embeddings.weight.shape == (1, HIDDEN)


def test_the_tokenizer_wraps_texts_and_pairs(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    good, films = [5], [6, 7]
    assert tokenizer("good").input_ids == [0, *good, 2]
    assert tokenizer("good", "films").input_ids == [0, *good, 2, 2, *films, 2]
    assert tokenizer.model_max_length == 8
    assert tokenizer.pad_token_id == 1


def test_white_space_and_compatibility_forms_do_not_matter(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(" \tgood\n ﬁlms ").input_ids == tokenizer("good films").input_ids


def test_the_saved_model_runs(folder):
    model = RobertaModel.from_pretrained(folder, add_pooling_layer=False).eval()
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([[0, 5, 6, 2]])).last_hidden_state
    assert hidden.shape == (1, 4, HIDDEN)
    assert hidden.isfinite().all()
