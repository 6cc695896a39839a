"""A merged base answers as the base and its LoRA adapter do."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from molex import MolexModel, write_adapter
from molex.errors import AdapterError, MolexError
from molex.merge import MergeError, merge
from tests.tiny import DECODERS, ENCODERS, molex_config, random_adapter, random_ids

REQUESTS = [random_ids(length, seed=length) for length in (7, 1, 12)]


@pytest.fixture
def lora(base_folder, spec_of, tmp_path):
    """Writes a LoRA adapter for a family; returns its base's folder and its own."""

    def write(family, **config):
        write_adapter(random_adapter(spec_of(family), seed=3, **config), tmp_path / "lora")
        return base_folder(family), tmp_path / "lora"

    return write


def logits(base, adapter=None):
    model = MolexModel.from_pretrained(base, dtype=torch.float64)
    if adapter is not None:
        model.load_adapter("a", adapter)
    return model(input_ids=REQUESTS, adapters=["a" if adapter else None] * len(REQUESTS)).logits


def assert_alike(given, expected):
    """The merged weights are rounded to the base's float32, each by 6e-8 of its size, over five layers."""
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ENCODERS + DECODERS)
def test_a_classifier_becomes_a_base_and_a_head(family, lora, tmp_path):
    base, adapter = lora(family)
    merge(base, adapter, tmp_path / "merged", tmp_path / "head")
    assert_alike(logits(tmp_path / "merged", tmp_path / "head"), logits(base, adapter))
    model = MolexModel.from_pretrained(tmp_path / "merged")
    model.load_adapter("head", tmp_path / "head")
    plain = model(input_ids=REQUESTS, adapters=["head", None, "head"]).logits
    alone = model(input_ids=REQUESTS[:1], adapters=["head"]).logits
    torch.testing.assert_close(plain[0], alone[0])


@pytest.mark.parametrize("family", DECODERS)
def test_a_generator_becomes_a_base(family, lora, tmp_path):
    base, adapter = lora(family, task="CAUSAL_LM")
    merge(base, adapter, tmp_path / "merged")
    given = logits(tmp_path / "merged")
    assert_alike(given, logits(base, adapter))
    with pytest.raises(AssertionError):
        assert_alike(given, logits(base))


def test_the_base_keeps_its_precision(lora, tmp_path):
    base, adapter = lora("llama", task="CAUSAL_LM")
    half = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "half")
    merge(tmp_path / "half", adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}


def test_what_cannot_be_merged_is_refused_and_leaves_nothing(lora, spec_of, tmp_path):
    base, adapter = lora("roberta")
    out, head = tmp_path / "merged", tmp_path / "head"
    with pytest.raises(MergeError, match="output: a folder is needed"):
        merge(base, adapter, out)
    with pytest.raises(AdapterError):
        merge(base, tmp_path, out, head)
    with pytest.raises(MolexError, match="no such folder"):
        merge(tmp_path / "nowhere", adapter, out, head)
    head.mkdir()
    with pytest.raises(MergeError, match="output: head exists already"):
        merge(base, adapter, out, head)
    head.rmdir()
    write_adapter(random_adapter(spec_of("roberta"), seed=1, molex=molex_config()), tmp_path / "molex")
    with pytest.raises(MergeError, match="depend on the input"):
        merge(base, tmp_path / "molex", out, head)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "molex"]


def test_a_generator_leaves_no_adapter(lora, tmp_path):
    base, adapter = lora("gpt2", task="CAUSAL_LM")
    with pytest.raises(MergeError, match="nothing is left"):
        merge(base, adapter, tmp_path / "merged", tmp_path / "head")


def test_a_failed_write_leaves_no_half_folder(lora, tmp_path, monkeypatch):
    base, adapter = lora("roberta")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("molex.merge.load_tokenizer", fail)
    with pytest.raises(OSError, match="disk full"):
        merge(base, adapter, tmp_path / "merged", tmp_path / "head")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora"]
