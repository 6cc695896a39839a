"""What PEFT saves runs here, and what we save runs in PEFT, with equal logits."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from molex import AdapterError, MolexModel, read_adapter, write_adapter
from tests.tiny import DECODERS, ENCODERS, molex_config, random_adapter, random_ids, relabel

TOLERANCE = 1e-4
LABELS = 3
TEXTS = [random_ids(length, seed=length) for length in (1, 4, 11, 30)]

# Options for each family: names of one, of several and of ambiguous modules.
TARGETS = {
    "bert": (["query", "value"], ["query", "key", "intermediate.dense"]),
    "roberta": (["query", "value"], ["attention.self.query", "key", "intermediate.dense"]),
    "gpt2": (["c_attn"], ["c_attn", "c_proj", "c_fc"]),
    "llama": (["q_proj", "v_proj"], ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"]),
}
TARGETS |= {"mistral": TARGETS["llama"], "qwen2": TARGETS["llama"]}
VARIANTS = {
    "usual": {},
    "rslora": {"use_rslora": True, "r": 9},
    "some layers": {"layers_to_transform": [0, 3]},
    "gaussian": {"init_lora_weights": "gaussian", "lora_dropout": 0.3},
}


@pytest.fixture(autouse=True)
def _quiet_transformers():
    """transformers deprecates a name that PEFT still uses."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def stock(folder, task):
    if task == "CAUSAL_LM":
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(1)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=LABELS).eval()


def save_with_peft(family, folder, task, output, **options):
    """A LoRA adapter of PEFT with random weights, saved; returns the PEFT model."""
    if family == "gpt2":
        options["fan_in_fan_out"] = True
    model = get_peft_model(
        stock(folder, task), LoraConfig(**({"task_type": task, "r": 4, "lora_alpha": 6} | options))
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    with warnings.catch_warnings():
        # PEFT takes the biases of `lora_bias` for damaged factors.
        warnings.filterwarnings("ignore", r".*LoRA tensor\(s\) have invalid shape")
        model.eval().save_pretrained(output)
    return model


@torch.no_grad()
def assert_same_logits(peft_model, model, task):
    """Each text alone through PEFT, all of them in one batch through the packed forward."""
    output = model(TEXTS, ["a"] * len(TEXTS))
    for ids, logits in zip(TEXTS, output.logits, strict=True):
        expected = peft_model(input_ids=torch.tensor([ids])).logits[0]
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)


def tasks(family):
    return ["SEQ_CLS", "CAUSAL_LM"] if family in DECODERS else ["SEQ_CLS"]


FAMILY_TASKS = [(family, task) for family in ENCODERS + DECODERS for task in tasks(family)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("family", "task"), FAMILY_TASKS)
def test_what_peft_saves_gives_its_logits(base_folder, tmp_path, family, task, variant):
    base = base_folder(family)
    options = {"target_modules": TARGETS[family][0]} | VARIANTS[variant]
    peft_model = save_with_peft(family, base, task, tmp_path, **options)
    model = MolexModel.from_pretrained(base)
    model.load_adapter("a", tmp_path)
    assert_same_logits(peft_model, model, task)


@pytest.mark.parametrize(("family", "task"), FAMILY_TASKS)
def test_any_linear_layers_may_be_adapted(base_folder, tmp_path, family, task):
    base = base_folder(family)
    peft_model = save_with_peft(family, base, task, tmp_path, target_modules=TARGETS[family][1])
    model = MolexModel.from_pretrained(base)
    adapter = model.load_adapter("a", tmp_path)
    assert len({module for _, module in adapter.lora.updates}) >= 3
    assert_same_logits(peft_model, model, task)


@pytest.mark.parametrize("family", DECODERS)
def test_all_linear_layers_at_once(base_folder, tmp_path, family):
    base = base_folder(family)
    peft_model = save_with_peft(family, base, "CAUSAL_LM", tmp_path, target_modules="all-linear")
    model = MolexModel.from_pretrained(base)
    model.load_adapter("a", tmp_path)
    assert_same_logits(peft_model, model, "CAUSAL_LM")


def test_a_trained_pooler_of_bert_is_taken_along(base_folder, tmp_path):
    base = base_folder("bert")
    options = {"target_modules": ["query"], "modules_to_save": ["classifier", "pooler"]}
    peft_model = save_with_peft("bert", base, "SEQ_CLS", tmp_path, **options)
    model = MolexModel.from_pretrained(base)
    adapter = model.load_adapter("a", tmp_path)
    assert "bert.pooler.dense.weight" in adapter.head.tensors
    assert_same_logits(peft_model, model, "SEQ_CLS")


REFUSED = {
    "use_dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "rank_pattern": {"rank_pattern": {"query": 2}},
    "alpha_pattern": {"alpha_pattern": {"query": 2}},
    "init_lora_weights": {"init_lora_weights": "pissa"},
    "target_modules": {"target_modules": r".*\.query"},
    "trainable_token_indices": {"trainable_token_indices": [5]},
    "lora_bias": {"lora_bias": True},
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_is_not_supported_is_refused_by_its_name(base_folder, spec_of, tmp_path, field):
    options = {"target_modules": ["query"]} | REFUSED[field]
    save_with_peft("roberta", base_folder("roberta"), "SEQ_CLS", tmp_path, **options)
    with pytest.raises(AdapterError) as caught:
        read_adapter(tmp_path, spec_of("roberta"))
    assert caught.value.subject == field


def test_eva_leaves_the_base_alone(base_folder, spec_of, tmp_path):
    options = {"target_modules": ["query"], "init_lora_weights": "eva"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*[Ee][Vv][Aa].*")
        save_with_peft("roberta", base_folder("roberta"), "SEQ_CLS", tmp_path, **options)
    read_adapter(tmp_path, spec_of("roberta"))


def test_rslora_without_its_flag_would_differ(base_folder, tmp_path):
    """A guard on the tests above: the logits notice a scaling."""
    base = base_folder("roberta")
    peft_model = save_with_peft(
        "roberta", base, "SEQ_CLS", tmp_path, target_modules=["query"], use_rslora=True
    )
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_rslora": False}))
    model = MolexModel.from_pretrained(base)
    model.load_adapter("a", tmp_path)
    with pytest.raises(AssertionError):
        assert_same_logits(peft_model, model, "SEQ_CLS")


def open_with_peft(base, task, folder):
    with warnings.catch_warnings():
        # PEFT sets fan_in_fan_out of Conv1D itself, and says so.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        return PeftModel.from_pretrained(stock(base, task), folder).eval()


@pytest.mark.parametrize(("family", "task"), FAMILY_TASKS)
def test_what_we_save_gives_its_logits_in_peft(base_folder, tmp_path, family, task):
    base = base_folder(family)
    model = MolexModel.from_pretrained(base)
    write_adapter(random_adapter(model.spec, seed=1, task=task, num_labels=LABELS), tmp_path)
    model.load_adapter("a", tmp_path)
    assert_same_logits(open_with_peft(base, task, tmp_path), model, task)


def test_peft_ignores_our_labels_and_says_so(base_folder, spec_of, tmp_path):
    adapter = random_adapter(spec_of("roberta"), seed=1, num_labels=LABELS)
    write_adapter(relabel(adapter, ["a", "b", "c"]), tmp_path)
    with pytest.warns(UserWarning, match="'id2label'"):
        open_with_peft(base_folder("roberta"), "SEQ_CLS", tmp_path)


def test_peft_has_nothing_to_say_about_conv1d(base_folder, spec_of, tmp_path):
    write_adapter(random_adapter(spec_of("gpt2"), seed=1, num_labels=LABELS), tmp_path)
    PeftModel.from_pretrained(stock(base_folder("gpt2"), "SEQ_CLS"), tmp_path)


def test_peft_refuses_a_mixture_of_layers(base_folder, spec_of, tmp_path):
    write_adapter(random_adapter(spec_of("roberta"), seed=1, molex=molex_config()), tmp_path)
    with pytest.raises((KeyError, ValueError)):
        PeftModel.from_pretrained(stock(base_folder("roberta"), "SEQ_CLS"), tmp_path)
