from __future__ import annotations

import openai


def test_bases_and_adapters_are_listed_with_their_parents(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
        models = {model.id: model for model in client.models.list()}
    assert {name: model.parent for name, model in models.items()} == {
        "enc": None,
        "dec": None,
        "judge": "dec",
        "mood": "enc",
        "poet": "dec",
        "rank2": "enc",
        "topic": "enc",
        "writer": "dec",
    }
    # As in vLLM: where the weights are from.
    assert all(model.root == name for name, model in models.items())
    assert {(m.kind, m.task) for m in models.values()} == {
        ("base", None),
        ("base", "CAUSAL_LM"),
        ("molex", "SEQ_CLS"),
        ("lora", "SEQ_CLS"),
        ("molex", "CAUSAL_LM"),
        ("lora", "CAUSAL_LM"),
    }
    assert all(model.digest.startswith("sha256:") for model in models.values())
    assert models["dec"].max_model_len == 96


def test_one_model_can_be_asked_for(live):
    listed = {card["id"]: card for card in live.http.get("/v1/models").json()["data"]}
    for name in ("enc", "mood"):
        assert live.http.get(f"/v1/models/{name}").json() == listed[name]
    missing = live.http.get("/v1/models/nobody")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"
