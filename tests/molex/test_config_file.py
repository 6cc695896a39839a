"""The strict reader of adapter_config.json: what is written is read back, everything else is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molex.config import AdapterConfig, GateConfig, MolexConfig, VoteConfig
from molex.config_file import INFORMATIVE, config_fields, parse_config
from molex.errors import AdapterError

LAYERS = 6

LORA = {
    "peft_type": "LORA",
    "task_type": "SEQ_CLS",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["query", "value"],
}
MOLEX = LORA | {
    "peft_type": "MOLEX",
    "molex_version": 1,
    "gate": {"kind": "linear", "scope": "shared", "projection_dim": None, "normalize": "features"},
    "vote": {"rule": "mode", "score": "softmax", "over": "sequence"},
    "mixed_depths": [0, 1, 2],
    "top_k": 1,
    "gate_gradient": "none",
    "mix": {"kind": "fixed", "scope": "shared"},
}

depths = st.sets(st.integers(0, LAYERS - 1), min_size=1).map(lambda chosen: tuple(sorted(chosen)))
scopes = st.sampled_from(["shared", "depth"])
gates = st.one_of(
    st.builds(GateConfig, kind=st.just("linear"), scope=scopes),
    st.builds(
        GateConfig,
        kind=st.just("cosine"),
        scope=scopes,
        projection_dim=st.integers(1, 65536),
        normalize=st.sampled_from(["features", "sequence"]),
    ),
)
votes = st.builds(
    VoteConfig,
    rule=st.sampled_from(["mode", "mean"]),
    score=st.sampled_from(["softmax", "sigmoid"]),
    over=st.sampled_from(["sequence", "prompt"]),
)
mixtures = st.builds(
    MolexConfig,
    mixed_depths=depths,
    gate=gates,
    vote=votes,
    top_k=st.sampled_from([1, 2]),
    gate_gradient=st.sampled_from(["none", "straight_through"]),
    mix=st.sampled_from(["fixed", "learned"]),
    mix_scope=scopes,
)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
configs = st.builds(
    AdapterConfig,
    task_type=st.sampled_from(["SEQ_CLS", "CAUSAL_LM"]),
    r=st.integers(1, 1024),
    lora_alpha=st.floats(1e-3, 1e5),
    target_modules=st.lists(names, min_size=1, max_size=3).map(tuple),
    lora_dropout=st.floats(0, 0.99),
    use_rslora=st.booleans(),
    layers_to_transform=st.one_of(st.none(), depths),
    molex=st.one_of(st.none(), mixtures),
    base_model_name_or_path=names,
    id2label=st.one_of(st.none(), st.lists(names, max_size=12).map(lambda labels: dict(enumerate(labels)))),
)


@given(configs, st.sampled_from([(), ("classifier",), ("pooler", "classifier"), ("score",)]))
def test_what_is_written_is_read_back(config, head_modules):
    assert parse_config(json.dumps(config_fields(config, head_modules)), LAYERS) == config


SPECIFICATION = (Path(__file__).parents[2] / "docs" / "adapter-format.md").read_text()


def test_the_examples_of_the_specification_are_read():
    lora, molex = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", SPECIFICATION, re.DOTALL))
    for fields, kind in ((lora, "lora"), (molex, "molex")):
        config = parse_config(json.dumps(fields), 12)
        assert config.kind == kind
        assert config_fields(config, ["classifier"]) == fields


def test_the_specification_lists_every_field():
    nested = [f"{name}.{field}" for name, value in MOLEX.items() if type(value) is dict for field in value]
    plain = [name for name, value in MOLEX.items() if type(value) is not dict]
    defaults = [
        "lora_dropout",
        "use_rslora",
        "fan_in_fan_out",
        "layers_to_transform",
        "modules_to_save",
        "id2label",
        "bias",
    ]
    for name in [*nested, *plain, *defaults, "base_model_name_or_path", "init_lora_weights"]:
        assert f"| `{name}` |" in SPECIFICATION, name
    for name in INFORMATIVE:
        assert f"`{name}`" in SPECIFICATION, name


def changed(fields, path, value):
    """The fields with the one at a dotted path set to a value, or removed where that is `...`."""
    name, _, rest = path.partition(".")
    new = dict(fields)
    if rest:
        new[name] = changed(fields[name], rest, value)
    elif value is ...:
        del new[name]
    else:
        new[name] = value
    return new


def refusal(fields, path, value):
    with pytest.raises(AdapterError) as caught:
        parse_config(json.dumps(changed(fields, path, value)), LAYERS)
    assert caught.value.subject == path
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


REQUIRED = [*LORA, *(f for f in MOLEX if f not in LORA)]
NESTED = ["gate.kind", "gate.scope", "gate.normalize", "vote.rule", "vote.score", "vote.over"]


@pytest.mark.parametrize("changes", [{"task_type": "CAUSAL_LM"}, MOLEX], ids=["generator", "molex"])
def test_only_a_classification_head_can_stand_alone(changes):
    alone = LORA | {"target_modules": []}
    assert parse_config(json.dumps(alone), LAYERS).target_modules == ()
    with pytest.raises(AdapterError, match="target_modules: names no module"):
        parse_config(json.dumps(alone | changes | {"target_modules": []}), LAYERS)


@pytest.mark.parametrize("path", [*REQUIRED, *NESTED, "mix.kind", "mix.scope"])
def test_a_missing_field_is_named(path):
    assert "missing in adapter_config.json" in refusal(MOLEX, path, ...)


# Everything of PEFT that would change the forward pass and is not built.
UNSUPPORTED = {
    "use_dora": True,
    "bias": "lora_only",
    "lora_bias": True,
    "rank_pattern": {"query": 8},
    "alpha_pattern": {"query": 16},
    "layer_replication": [[0, 3], [2, 5]],
    "trainable_token_indices": [1, 2],
    "target_parameters": ["experts.weight"],
    "exclude_modules": ["value"],
    "layers_pattern": "layer",
    "megatron_config": {"x": 1},
    "loftq_config": {"loftq_bits": 4},
    "use_qalora": True,
    "alora_invocation_tokens": [5],
    "arrow_config": {"top_k": 3},
    "use_bdlora": {"nblocks": 2},
    "frobnicate": 1,
}


@pytest.mark.parametrize("name", UNSUPPORTED)
@pytest.mark.parametrize("fields", [LORA, MOLEX], ids=["lora", "molex"])
def test_what_is_not_supported_is_refused_by_name(fields, name):
    assert "is not supported" in refusal(fields, name, UNSUPPORTED[name])


@pytest.mark.parametrize("value", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga", 1])
def test_initialisations_that_change_the_base_are_refused(value):
    refusal(LORA, "init_lora_weights", value)


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "orthogonal", "eva"])
def test_initialisations_that_leave_the_base_alone_are_read(value):
    parse_config(json.dumps(LORA | {"init_lora_weights": value}), LAYERS)


@pytest.mark.parametrize("value", [".*query", "all-linear", "query"])
def test_a_pattern_of_targets_is_refused(value):
    assert "regular expression" in refusal(LORA, "target_modules", value)


WRONG = [
    ("peft_type", "LOHA"),
    ("peft_type", None),
    ("task_type", "SEQ_2_SEQ_LM"),
    ("task_type", "TOKEN_CLS"),
    ("r", 0),
    ("r", 1025),
    ("r", 4.0),
    ("r", True),
    ("r", "4"),
    ("lora_alpha", 0),
    ("lora_alpha", -1),
    ("lora_alpha", "8"),
    ("lora_alpha", True),
    ("lora_alpha", float("nan")),
    ("lora_alpha", float("inf")),
    ("lora_alpha", 10**400),
    ("lora_dropout", 1),
    ("lora_dropout", -0.1),
    ("use_rslora", 1),
    ("use_rslora", "true"),
    ("target_modules", {}),
    ("target_modules", None),
    ("target_modules", [1]),
    ("layers_to_transform", []),
    ("layers_to_transform", [LAYERS]),
    ("layers_to_transform", [1, 0]),
    ("layers_to_transform", [-1]),
    ("layers_to_transform", "0"),
    ("base_model_name_or_path", 7),
    ("modules_to_save", ["embed_tokens"]),
    ("modules_to_save", ["lm_head"]),
    ("problem_type", "multi_label_classification"),
    ("problem_type", True),
    ("id2label", ["a", "b"]),
    ("id2label", {"0": 1}),
    ("id2label", {"1": "a"}),
    ("id2label", {"0": "a", "2": "b"}),
    ("molex_version", 2),
    ("molex_version", True),
    ("molex_version", "1"),
    ("gate", None),
    ("gate", "linear"),
    ("gate.kind", "mlp"),
    ("gate.scope", "layer"),
    ("gate.normalize", "batch"),
    ("gate.projection_dim", 8),
    ("gate.frobnicate", 1),
    ("vote.rule", "median"),
    ("vote.score", "relu"),
    ("vote.over", "batch"),
    ("vote.frobnicate", 1),
    ("mixed_depths", []),
    ("mixed_depths", [0, LAYERS]),
    ("mixed_depths", [-1, 0]),
    ("mixed_depths", [1, 1]),
    ("mixed_depths", [2, 0]),
    ("mixed_depths", [0.0]),
    ("mixed_depths", [True]),
    ("mixed_depths", None),
    ("top_k", 0),
    ("top_k", 3),
    ("top_k", 1.0),
    ("gate_gradient", "gumbel"),
    ("mix", "fixed"),
    ("mix.kind", "free"),
    ("mix.scope", "layer"),
    ("mix.alpha", 0.95),
]


@pytest.mark.parametrize(("path", "value"), WRONG, ids=str)
def test_a_wrong_value_is_named(path, value):
    refusal(MOLEX, path, value)


def test_a_depth_that_the_base_has_not_is_named():
    with pytest.raises(AdapterError, match="names depth 7; the base has depths 0 to 5"):
        parse_config(json.dumps(MOLEX | {"mixed_depths": [0, 7, 8]}), 6)


def test_modules_to_save_is_a_list():
    refusal(LORA, "modules_to_save", "classifier")


def test_a_label_that_cannot_be_encoded_is_refused():
    refusal(LORA, "id2label", {"0": "\ud800", "1": "b"})


@pytest.mark.parametrize("width", [None, 0, 65537, 8.0, "8"])
def test_a_cosine_gate_needs_a_width(width):
    cosine = changed(MOLEX, "gate.kind", "cosine")
    refusal(cosine, "gate.projection_dim", width)


def test_a_cosine_gate_without_its_width_is_refused():
    with pytest.raises(AdapterError, match=r"gate.projection_dim: must be a number"):
        parse_config(
            json.dumps(changed(changed(MOLEX, "gate.kind", "cosine"), "gate.projection_dim", ...)), 6
        )


def test_a_base_of_one_layer_has_no_second_one_to_choose():
    with pytest.raises(AdapterError, match="top_k: 2 is not a whole number from 1 to 1"):
        parse_config(json.dumps(MOLEX | {"mixed_depths": [0], "top_k": 2}), 1)


def test_molex_fields_do_not_belong_to_lora():
    assert "is not supported" in refusal(LORA, "mixed_depths", [0])


@pytest.mark.parametrize("value", [None, False, {}, [], ""])
def test_unknown_fields_that_say_nothing_are_passed_over(value):
    assert parse_config(json.dumps(LORA | {"frobnicate": value}), LAYERS) == parse_config(
        json.dumps(LORA), LAYERS
    )


@pytest.mark.parametrize(
    "name",
    [
        "auto_mapping",
        "inference_mode",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
    ],
)
def test_fields_that_do_not_touch_the_forward_pass_may_say_anything(name):
    parse_config(json.dumps(LORA | {name: 16}), LAYERS)


def test_one_layer_may_be_given_as_a_number():
    assert parse_config(json.dumps(LORA | {"layers_to_transform": 3}), LAYERS).layers_to_transform == (3,)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"\x80",
        b"[" * 100_000,
        b"1" * 5_000,
        b'{"r": %s}' % (b"9" * 5_000),
        b"nul",
    ],
    ids=range(8),
)
def test_what_is_not_json_is_refused(text):
    with pytest.raises(AdapterError, match="not valid JSON") as caught:
        parse_config(text, LAYERS)
    assert caught.value.subject == "adapter_config.json"


@pytest.mark.parametrize("text", ["[]", "null", "3", '"LORA"'])
def test_what_is_not_an_object_is_refused(text):
    with pytest.raises(AdapterError, match=r"adapter_config.json: not a JSON object"):
        parse_config(text, LAYERS)


def test_long_values_are_shortened():
    assert len(refusal(LORA, "peft_type", "x" * 10_000)) < 300


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)


def parsed_or_named(fields):
    """Any other exception than AdapterError fails the test."""
    try:
        result = parse_config(json.dumps(fields), LAYERS)
    except AdapterError as error:
        result = error.subject
    assert result


@given(st.sampled_from([*REQUIRED, *NESTED, *UNSUPPORTED, "id2label", "modules_to_save"]), anything)
def test_any_value_of_any_field_is_read_or_refused_by_name(path, value):
    parsed_or_named(changed(MOLEX, path, value))


@given(st.dictionaries(st.sampled_from([*MOLEX, "id2label", "x"]), anything))
def test_any_object_is_read_or_refused_by_name(fields):
    parsed_or_named(fields)
