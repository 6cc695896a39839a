"""`adapter_config.json`: the strict reader and the writer. `docs/adapter-format.md` is the specification."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

from molex.config import (
    AdapterConfig,
    Axis,
    GateConfig,
    GateGradient,
    GateKind,
    MixKind,
    MolexConfig,
    ProblemType,
    Scope,
    TaskType,
    VoteConfig,
    VoteOver,
    VoteRule,
    VoteScore,
)
from molex.errors import AdapterError
from molex.strict_json import parse_object

MOLEX_VERSION = 1
MAX_RANK = 1024
MAX_PROJECTION_DIM = 65536

# Fields of PEFT that say nothing about the forward pass, whatever their value.
INFORMATIVE = frozenset(
    (
        "auto_mapping",
        "eva_config",
        "inference_mode",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
    )
)
# Initialisations that leave the base weights alone. The others (PiSSA, OLoRA, LoftQ, …) change them.
INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")
HEAD_MODULES = ("classifier", "score", "pooler")

Fields = dict[str, Any]


def parse_config(text: str | bytes, num_layers: int) -> AdapterConfig:
    """Parse the text of `adapter_config.json` for a base model of `num_layers` layers.

    Raises AdapterError that names the field if one is missing, of the wrong type, out of range or
    unsupported. A field that this reader does not know must be null, false or empty.
    """
    fields = _load(text)
    peft_type = _take(fields, "peft_type", _one_of(("LORA", "MOLEX")))
    rank = _take(fields, "r", _integer(1, MAX_RANK))
    config = AdapterConfig(
        task_type=_take(fields, "task_type", _one_of(get_args(TaskType))),
        r=rank,
        lora_alpha=_take(fields, "lora_alpha", _positive),
        target_modules=_take(fields, "target_modules", _strings),
        lora_dropout=_take(fields, "lora_dropout", _probability, 0.0),
        use_rslora=_take(fields, "use_rslora", _boolean, False),
        fan_in_fan_out=_take(fields, "fan_in_fan_out", _boolean, False),
        layers_to_transform=_take(fields, "layers_to_transform", _optional(_depths(num_layers)), None),
        problem_type=_take(fields, "problem_type", _optional(_one_of(get_args(ProblemType))), None)
        or "single_label_classification",
        molex=_parse_molex(fields, num_layers) if peft_type == "MOLEX" else None,
        base_model_name_or_path=_take(fields, "base_model_name_or_path", _optional(_string), None) or "",
        id2label=_take(fields, "id2label", _optional(_labels), None),
    )
    if not config.target_modules and (config.molex is not None or config.task_type != "SEQ_CLS"):
        raise AdapterError("target_modules", "names no module; only a classification head can stand alone")
    if config.regression and config.task_type != "SEQ_CLS":
        raise AdapterError("problem_type", "regression needs the task_type SEQ_CLS")
    _take(fields, "modules_to_save", _optional(_head_modules), None)
    _take(fields, "bias", _one_of(("none",)), "none")
    _take(fields, "init_lora_weights", _one_of(INITIALISATIONS), True)
    _refuse_rest(fields)
    return config


def _load(text: str | bytes) -> Fields:
    try:
        return parse_object(text)
    except ValueError as error:
        raise AdapterError("adapter_config.json", str(error)) from error


def _parse_molex(fields: Fields, num_layers: int) -> MolexConfig:
    _take(fields, "molex_version", _one_of((MOLEX_VERSION,)))
    gate = _take(fields, "gate", _object)
    vote = _take(fields, "vote", _object)
    mix = _take(fields, "mix", _object)
    config = MolexConfig(
        mixed_depths=_take(fields, "mixed_depths", _depths(num_layers)),
        gate=_parse_gate(gate),
        vote=VoteConfig(
            rule=_take(vote, "rule", _one_of(get_args(VoteRule)), within="vote"),
            score=_take(vote, "score", _one_of(get_args(VoteScore)), within="vote"),
            over=_take(vote, "over", _one_of(get_args(VoteOver)), within="vote"),
        ),
        top_k=_take(fields, "top_k", _integer(1, min(2, num_layers))),
        gate_gradient=_take(fields, "gate_gradient", _one_of(get_args(GateGradient))),
        mix=_take(mix, "kind", _one_of(get_args(MixKind)), within="mix"),
        mix_scope=_take(mix, "scope", _one_of(get_args(Scope)), within="mix"),
    )
    for name, nested in (("gate", gate), ("vote", vote), ("mix", mix)):
        _refuse_rest(nested, within=name)
    return config


def _parse_gate(gate: Fields) -> GateConfig:
    kind = _take(gate, "kind", _one_of(get_args(GateKind)), within="gate")
    width = _optional(_integer(1, MAX_PROJECTION_DIM))
    projection_dim = _take(gate, "projection_dim", width, None, within="gate")
    if (kind == "cosine") != (projection_dim is not None):
        raise AdapterError("gate.projection_dim", f"must be {'null' if kind == 'linear' else 'a number'}")
    return GateConfig(
        kind=kind,
        scope=_take(gate, "scope", _one_of(get_args(Scope)), within="gate"),
        projection_dim=projection_dim,
        normalize=_take(gate, "normalize", _one_of(get_args(Axis)), within="gate"),
    )


_REQUIRED = object()


def _take(
    fields: Fields,
    name: str,
    check: Callable[[Any], Any],
    default: Any = _REQUIRED,
    within: str = "",
) -> Any:
    """Remove a field and return its checked value. `check` raises ValueError saying what it wants."""
    path = f"{within}.{name}" if within else name
    if name not in fields:
        if default is _REQUIRED:
            raise AdapterError(path, "missing in adapter_config.json")
        return default
    value = fields.pop(name)
    try:
        return check(value)
    except ValueError as error:
        raise AdapterError(path, f"{_shown(value)} {error}") from None


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _refuse_rest(fields: Fields, within: str = "") -> None:
    for name, value in fields.items():
        if name not in INFORMATIVE and value not in (None, False, {}, [], ""):
            raise AdapterError(f"{within}.{name}" if within else name, f"{_shown(value)} is not supported")


def _one_of(allowed: Iterable[Any]) -> Callable[[Any], Any]:
    options = tuple(allowed)

    def check(value: Any) -> Any:
        if not any(value == option and type(value) is type(option) for option in options):
            raise ValueError(f"is not supported; expected {' or '.join(_shown(o) for o in options)}")
        return value

    return check


def _integer(low: int, high: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"is not a whole number from {low} to {high}")
        return value

    return check


def _optional(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else check(value)


def _positive(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < 1e6:
        raise ValueError("is not a positive number")
    return float(value)


def _probability(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise ValueError("is not a number in [0, 1)")
    return float(value)


def _boolean(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("is neither true nor false")
    return value


def _string(value: Any) -> str:
    if type(value) is not str:
        raise ValueError("is not a string")
    return value


def _object(value: Any) -> Fields:
    if type(value) is not dict:
        raise ValueError("is not an object")
    return dict(value)


def _strings(value: Any) -> tuple[str, ...]:
    if type(value) is str:
        raise ValueError("is a regular expression or keyword; list the names of the modules instead")
    if type(value) is not list or any(type(item) is not str for item in value):
        raise ValueError("is not a list of module names")
    return tuple(value)


def _depths(num_layers: int) -> Callable[[Any], tuple[int, ...]]:
    def check(value: Any) -> tuple[int, ...]:
        values = [value] if type(value) is int else value
        if type(values) is not list or not values or any(type(depth) is not int for depth in values):
            raise ValueError("is not a list of depths")
        if sorted(set(values)) != values:
            raise ValueError("does not list increasing depths")
        if outside := [depth for depth in values if not 0 <= depth < num_layers]:
            raise ValueError(f"names depth {outside[0]}; the base has depths 0 to {num_layers - 1}")
        return tuple(values)

    return check


def _head_modules(value: Any) -> tuple[str, ...]:
    if type(value) is not list:
        raise ValueError("is not a list of module names")
    for name in value:
        if name not in HEAD_MODULES:
            raise ValueError(f"names {_shown(name)}; only {', '.join(HEAD_MODULES)} can be saved along")
    return tuple(value)


def _labels(value: Any) -> dict[int, str]:
    if type(value) is not dict or any(type(label) is not str for label in value.values()):
        raise ValueError("is not an object of label names")
    if list(value) != [str(i) for i in range(len(value))]:
        raise ValueError('has keys other than "0", "1", … in order')
    if any("\ud800" <= character <= "\udfff" for label in value.values() for character in label):
        raise ValueError("has a label with half of a surrogate pair, which is no text")
    return {int(i): label for i, label in value.items()}


def config_fields(config: AdapterConfig, head_modules: Iterable[str]) -> Mapping[str, Any]:
    """The content of `adapter_config.json`, with PEFT's names for all that PEFT knows."""
    fields: Fields = {
        "peft_type": "LORA" if config.molex is None else "MOLEX",
        "task_type": config.task_type,
        "base_model_name_or_path": config.base_model_name_or_path,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "fan_in_fan_out": config.fan_in_fan_out,
        "target_modules": list(config.target_modules),
        "layers_to_transform": _list_or_none(config.layers_to_transform),
        "modules_to_save": list(head_modules) or None,
        "bias": "none",
    }
    if config.regression:
        fields["problem_type"] = config.problem_type
    if config.id2label is not None:
        fields["id2label"] = {str(i): label for i, label in config.id2label.items()}
    return fields if config.molex is None else fields | _molex_fields(config.molex)


def _list_or_none(values: tuple[int, ...] | None) -> list[int] | None:
    return None if values is None else list(values)


def _molex_fields(molex: MolexConfig) -> Fields:
    gate, vote = molex.gate, molex.vote
    return {
        "molex_version": MOLEX_VERSION,
        "gate": {
            "kind": gate.kind,
            "scope": gate.scope,
            "projection_dim": gate.projection_dim,
            "normalize": gate.normalize,
        },
        "vote": {"rule": vote.rule, "score": vote.score, "over": vote.over},
        "mixed_depths": list(molex.mixed_depths),
        "top_k": molex.top_k,
        "gate_gradient": molex.gate_gradient,
        "mix": {"kind": molex.mix, "scope": molex.mix_scope},
    }
