from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file


@pytest.fixture
def folder(adapters_folder):
    """A copy of an adapter inside the root, for a test to spoil."""
    shutil.copytree(adapters_folder / "topic", adapters_folder / "copy")
    yield adapters_folder / "copy"
    shutil.rmtree(adapters_folder / "copy")


@pytest.fixture
def put(live):
    """Loads an adapter and removes it in the end."""
    names = set()

    def load(name: str, source: str, **body):
        names.add(name)
        return live.http.put(f"/v1/adapters/{name}?wait=60", json={"source": source} | body)

    yield load
    for name in names:
        live.http.delete(f"/v1/adapters/{name}")


def test_an_adapter_comes_answers_and_goes(live, put):
    created = put("fresh", "topic")
    assert created.status_code == 201
    card = created.json()
    assert (card["base"], card["kind"], card["task"], card["rank"]) == ("enc", "lora", "SEQ_CLS", 2)
    assert card["labels"] == {str(i): f"LABEL_{i}" for i in range(4)}
    assert live.http.get("/v1/adapters/fresh").json() == card
    assert card in live.http.get("/v1/adapters").json()["data"]
    answer = live.classify(model="fresh", input="w1").json()
    assert answer["adapter_digest"] == card["digest"] == created.headers["x-adapter-digest"]
    assert put("fresh", "mood").status_code == 200
    assert live.http.delete("/v1/adapters/fresh").status_code == 204
    assert live.http.delete("/v1/adapters/fresh").status_code == 404
    assert live.http.get("/v1/adapters/fresh").json()["error"]["code"] == "adapter_not_found"
    assert live.classify(model="fresh", input="w1").status_code == 404


def test_a_bad_tensor_is_named(live, put, folder):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_B" in name)
    save_file(tensors | {name: tensors[name] * float("nan")}, path)
    response = put("spoilt", "copy", base="enc")
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["code"], error["param"]) == ("invalid_adapter", name)
    assert name in error["message"]
    assert str(folder.parent) not in response.text


def test_a_bad_field_is_named(live, put, folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bias": "all"}))
    error = put("spoilt", "copy", base="enc").json()["error"]
    assert "bias" in error["message"]


def test_a_bad_adapter_leaves_the_one_in_service(live, put, folder):
    before = put("stable", "copy").json()["digest"]
    (folder / "adapter_model.safetensors").write_bytes(b"junk")
    assert put("stable", "copy").status_code == 400
    assert live.classify(model="stable", input="w1").json()["adapter_digest"] == before


@pytest.mark.parametrize(
    ("name", "body", "status", "param"),
    [
        ("enc", {"source": "topic"}, 409, "name"),
        ("x", {"source": "/etc"}, 403, "source"),
        ("x", {"source": "../../outside"}, 403, "source"),
        ("x", {"source": "nowhere"}, 400, "source"),
        ("x", {"source": "topic", "base": "gpt9"}, 400, "base"),
        ("x", {"source": "a\0b"}, 400, "source"),
        ("x", {}, 400, "source"),
        ("x", {"source": "topic", "force": True}, 400, "force"),
        ("a b", {"source": "topic"}, 400, "name"),
        (".x", {"source": "topic"}, 400, "name"),
    ],
)
def test_bad_loads_are_refused_by_field(live, name, body, status, param):
    response = live.http.put(f"/v1/adapters/{name}?wait=60", json=body)
    assert response.status_code == status
    assert response.json()["error"]["param"] == param


def test_vllms_verbs(live):
    load = {"lora_name": "lora", "lora_path": "topic"}
    loaded = live.post("/v1/load_lora_adapter", load)
    assert loaded.status_code == 200
    assert loaded.text == "Success: LoRA adapter 'lora' added successfully."
    again = live.post("/v1/load_lora_adapter", load)
    assert again.status_code == 400
    message = again.json()["error"].pop("message")
    assert message.startswith("The lora adapter 'lora' has already been loaded.")
    assert again.json()["error"] | {"message": ""} == {
        "message": "",
        "type": "InvalidUserInput",
        "param": "lora_name",
        "code": 400,
    }
    nowhere = live.post("/v1/load_lora_adapter", load | {"lora_name": "other", "lora_path": "nowhere"})
    assert (nowhere.status_code, nowhere.json()["error"]["type"]) == (404, "NotFoundError")
    assert nowhere.json()["error"]["param"] == "lora_path"
    assert live.post("/v1/load_lora_adapter", load | {"load_inplace": True}).status_code == 200
    assert live.classify(model="lora", input="w1").status_code == 200
    gone = live.post("/v1/unload_lora_adapter", {"lora_name": "lora"})
    assert gone.text == "Success: LoRA adapter 'lora' removed successfully."
    missing = live.post("/v1/unload_lora_adapter", {"lora_name": "lora"})
    assert missing.status_code == missing.json()["error"]["code"] == 404
    assert missing.json()["error"]["type"] == "NotFoundError"
    assert missing.json()["error"]["param"] == "lora_name"
