"""An exported base answers as its graphs do, and is what was exported or is refused."""

from __future__ import annotations

import json
import os

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from molex import MolexModel, Row, backends, export, write_adapter
from molex.errors import BaseModelError
from molex.export import ExportError
from molex.exported import ABOUT, PRECISIONS
from molex.merge import merge
from tests.batches import mixed_rows
from tests.tiny import DECODERS, ENCODERS, random_adapter, random_ids

PREFIX = "base model"


@pytest.fixture
def exported(base_folder, tmp_path):
    """The folder of a base, exported in 8 bits."""
    export.export(base_folder("roberta"), tmp_path / "exported", "int8")
    return tmp_path / "exported"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", ENCODERS + DECODERS)
@torch.inference_mode()
def test_it_answers_as_the_same_graphs_do(family, precision, base_folder, tmp_path):
    folder = tmp_path / "exported"
    export.export(base_folder(family), folder, precision, "int4")
    loaded, expected = MolexModel.from_pretrained(folder), MolexModel.from_pretrained(base_folder(family))
    assert loaded.runs_on == f"ONNX Runtime, as exported in {loaded.backbone.exported}"
    expected.prepack(PRECISIONS[precision], routed_bits=4, backend="onnx")
    assert loaded.spec == expected.spec
    assert loaded.nbytes == expected.nbytes
    rows = mixed_rows(expected, [5, 1, 23, 7, 2, 9])
    for one, other in zip(loaded.run(rows).logits, expected.run(rows).logits, strict=True):
        assert torch.equal(one, other)
    tokenizers = [AutoTokenizer.from_pretrained(base) for base in (folder, base_folder(family))]
    assert tokenizers[0]("w1 w2 w3") == tokenizers[1]("w1 w2 w3")


@pytest.mark.parametrize("has_pooler", [True, False])
@torch.inference_mode()
def test_a_pooler_is_kept_where_the_base_has_one(has_pooler, base_folder, tmp_path):
    model = AutoModel.from_pretrained(base_folder("bert"))
    if not has_pooler:
        model.pooler = None
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(base_folder("bert")).save_pretrained(tmp_path / "base")
    export.export(tmp_path / "base", tmp_path / "exported", "fp32")
    loaded = MolexModel.from_pretrained(tmp_path / "exported")
    expected = MolexModel.from_pretrained(tmp_path / "base")
    assert loaded.spec.has_pooler == has_pooler
    row = Row(random_ids(7, seed=1), random_adapter(expected.spec, seed=1))
    one, other = (model.run([row]).logits[0] for model in (loaded, expected))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_weights_of_layers_are_in_graphs_alone(exported, base_folder):
    stored, whole = (
        (folder / "model.safetensors").stat().st_size for folder in (exported, base_folder("roberta"))
    )
    assert stored < whole / 2
    graphs = {str(path.relative_to(exported)) for path in exported.glob("**/*.onnx")}
    assert graphs == set(json.loads((exported / ABOUT).read_text())["files"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8, "backend": "kernels"}, "run with the backend onnx, not kernels"),
        ({"bits": 8, "backend": "torch"}, "run with the backend onnx, not torch"),
        ({"bits": 4}, "exported in int8"),
        ({"bits": 8, "routed_bits": 4}, "exported in int8"),
    ],
    ids=str,
)
def test_it_runs_as_it_was_exported_or_not_at_all(changes, message, exported):
    model = MolexModel.from_pretrained(exported)
    with pytest.raises(BaseModelError, match=message):
        model.prepack(**changes)
    model.prepack(bits=8)


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"routed_dtype": torch.bfloat16}], ids=str)
def test_it_has_one_precision_of_hidden_states(options, exported):
    with pytest.raises(BaseModelError, match="exported for CPUs, in float32"):
        MolexModel.from_pretrained(exported, **options)


def change(folder, **fields):
    about = json.loads((folder / ABOUT).read_text())
    (folder / ABOUT).write_text(json.dumps(about | fields))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: os.truncate(f / "layers/003.finish.onnx", 500), "layers/003.finish.onnx is not what was"),
        (lambda f: (f / "layers/000.project.onnx").unlink(), "layers/000.project.onnx: No such file"),
        (lambda f: change(f, molex_export=2), "molex_export is 2, not 1"),
        (lambda f: change(f, precision="fp8"), "precision is 'fp8', not one of fp32, int8, int4"),
        (lambda f: change(f, files=[]), "files is no object"),
        (lambda f: change(f, licence="none"), "licence"),
        (lambda f: (f / ABOUT).write_text("{"), f"{ABOUT}: not valid JSON"),
    ],
    ids=["cut", "missing", "version", "precision", "files", "field", "json"],
)
def test_what_was_not_exported_is_refused(damage, message, exported):
    damage(exported)
    with pytest.raises(BaseModelError, match=message):
        MolexModel.from_pretrained(exported)


def test_it_takes_onnx_runtime(exported, monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.raises(BaseModelError, match="was exported for ONNX Runtime, which is not installed"):
        MolexModel.from_pretrained(exported)


def test_graphs_cannot_be_exported_or_merged_again(exported, spec_of, tmp_path):
    with pytest.raises(BaseModelError, match="it was exported"):
        export.export(exported, tmp_path / "again", "int4")
    write_adapter(random_adapter(spec_of("roberta"), seed=1), tmp_path / "lora")
    with pytest.raises(BaseModelError, match="it was exported"):
        merge(exported, tmp_path / "lora", tmp_path / "merged", tmp_path / "head")


def test_a_folder_that_is_there_is_left_alone(base_folder, tmp_path):
    with pytest.raises(ExportError, match="exists already"):
        export.export(base_folder("bert"), tmp_path, "fp32")


def test_routed_layers_are_in_no_more_bits_than_the_others(base_folder, tmp_path):
    with pytest.raises(ExportError, match="routed layers cannot be in fp32 where the others are in int8"):
        export.export(base_folder("bert"), tmp_path / "exported", "int8", "fp32")


def test_nothing_is_left_of_what_could_not_be_written(base_folder, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(export, "write_about", fail)
    with pytest.raises(OSError, match="no space left"):
        export.export(base_folder("bert"), tmp_path / "exported", "fp32")
    assert not list(tmp_path.iterdir())
