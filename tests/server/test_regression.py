"""An adapter whose answer is a number, through every dialect that classifies."""

from __future__ import annotations

import pytest

from molex import write_adapter
from tests.tiny import molex_config, random_adapter

PAIRS = [["w1 w2", "w3"], ["w9", "w8 w7"]]


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    """`rating`, and `yes`, the same weights as a classifier of one label."""
    folder = tmp_path_factory.mktemp("regression")
    spec = models["enc"].spec
    for name, problem in (("rating", "regression"), ("yes", "single_label_classification")):
        adapter = random_adapter(spec, seed=7, num_labels=1, molex=molex_config((0, 2)), problem_type=problem)
        write_adapter(adapter, folder / name)
    return folder


@pytest.fixture
def live(settings, start, folder):
    return start(settings.model_copy(update={"adapters": folder}))


def test_every_dialect_answers_with_the_number_itself(live, models, folder):
    model = models["enc"]
    model.load_adapter("rating", folder / "rating")
    prompts = live.engine.bases["enc"].tokenization.encode(PAIRS, "input")
    ids = [prompt.token_ids for prompt in prompts]
    types = [prompt.token_type_ids for prompt in prompts]
    numbers = [float(logits) for logits in model(ids, ["rating"] * 2, token_type_ids=types).logits]

    ours = live.classify(model="rating", input=PAIRS).json()["data"]
    assert [entry["probs"] for entry in ours] == [[pytest.approx(number, abs=1e-4)] for number in numbers]
    exact = [entry["probs"][0] for entry in ours]
    assert {entry["num_classes"] for entry in ours} == {1}
    for raw in (False, True):
        tei = live.post("/tei/rating/predict", {"inputs": PAIRS, "raw_scores": raw}).json()
        assert tei == [[{"score": number, "label": "LABEL_0"}] for number in exact]
    first, second = zip(*PAIRS, strict=True)
    inputs = [
        {"name": "text", "shape": [2], "datatype": "BYTES", "data": first},
        {"name": "text_pair", "shape": [2], "datatype": "BYTES", "data": second},
    ]
    v2 = live.post("/v2/models/rating/infer", {"inputs": inputs}).json()
    assert v2["outputs"] == [{"name": "score", "datatype": "FP32", "shape": [2, 1], "data": exact}]
    assert live.http.get("/v2/models/rating").json()["outputs"] == [
        {"name": "score", "datatype": "FP32", "shape": [-1, 1]}
    ]


def test_one_label_without_regression_stays_a_probability(live):
    number, probability = (
        live.classify(model=name, input="w1 w2").json()["data"][0]["probs"][0] for name in ("rating", "yes")
    )
    assert 0 < probability < 1
    assert probability == pytest.approx(1 / (1 + 2.718281828459045**-number))
