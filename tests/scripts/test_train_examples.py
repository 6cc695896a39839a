"""Every recipe of an example adapter fits its base."""

from pathlib import Path

import pytest

from molex import MolexModel
from molex.train.arguments import complete
from scripts.train_examples import RECIPES, arguments_of
from tests.tiny import tiny_base


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_complete(name, encoder_spec, decoder_spec):
    recipe = RECIPES[name]
    spec = encoder_spec if recipe["task_type"] == "SEQ_CLS" else decoder_spec
    arguments = arguments_of(recipe, Path("data"), Path("models"), Path("out"), threads=1)
    completed = complete(arguments, spec)
    assert completed.train == Path("data") / recipe["train"]
    assert name.endswith(completed.method)


@pytest.fixture(scope="module")
def encoder_spec(tmp_path_factory):
    return MolexModel.from_pretrained(tiny_base("roberta", tmp_path_factory.mktemp("e"))).spec


@pytest.fixture(scope="module")
def decoder_spec(tmp_path_factory):
    return MolexModel.from_pretrained(tiny_base("llama", tmp_path_factory.mktemp("d"))).spec
