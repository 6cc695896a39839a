"""The options of `molex train` and `molex evaluate`, each spelled once, and what they imply."""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Option

from molex.backbone import BaseSpec
from molex.config import AdapterConfig, GateConfig, MolexConfig, ProblemType, TaskType, VoteConfig
from molex.errors import MolexError
from molex.train.metrics import CLASSIFICATION, GENERATION, REGRESSION

Method = Literal["molex", "lora"]
Dtype = Literal["float32", "bfloat16"]


class ArgumentError(MolexError):
    """An option that is wrong or does not fit another one; the message names it."""


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Train a MoLEx or LoRA adapter and write it to a folder."""

    base: Annotated[str, Option(help="Base model: a folder or hub id.")]
    method: Annotated[Method, Option(help="Kind of adapter.")] = "molex"
    task_type: Annotated[TaskType, Option(help="Classification or generation.")] = "SEQ_CLS"
    problem_type: Annotated[ProblemType, Option(help="Of SEQ_CLS: classes, or one number.")] = (
        "single_label_classification"
    )
    train: Annotated[Path, Option(help="Training data: .tsv, .csv or .jsonl.")]
    eval: Annotated[Path, Option(help="Data that selects the best epoch.")]
    output: Annotated[Path, Option(help="Folder for the adapter.")]
    epochs: Annotated[int, Option(min=1)] = 3
    batch_size: Annotated[int, Option(min=1)] = 32
    learning_rate: Annotated[float, Option(help="Peak, after warm-up.")] = 1e-3
    r: Annotated[int, Option(min=1, help="Rank of the low-rank updates.")] = 8
    lora_alpha: Annotated[float, Option(help="The updates are scaled by lora_alpha / r.")] = 16.0
    lora_dropout: Annotated[float, Option(help="Dropout on the input of the updates.")] = 0.0
    target_modules: Annotated[
        str | None, Option(help="Adapted linear layers, by comma. Default: query and value.")
    ] = None
    mixed_depths: Annotated[
        str | None, Option(help="MoLEx: 'all', a range '0-5' or a list '0,2,4'. Default: all.")
    ] = None
    alpha: Annotated[
        float | None, Option(help="MoLEx: initial weight of a depth's own layer. Default: 0.95.")
    ] = None
    mix: Annotated[Literal["fixed", "learned"] | None, Option(help="MoLEx: train alpha? Default: fixed.")] = (
        None
    )
    gate: Annotated[
        Literal["linear", "cosine"] | None, Option(help="MoLEx: kind of gate. Default: linear.")
    ] = None
    gate_scope: Annotated[
        Literal["shared", "depth"] | None,
        Option(help="MoLEx: one gate for all depths, or one each. Default: shared."),
    ] = None
    projection_dim: Annotated[
        int | None, Option(min=1, help="MoLEx: width of a cosine gate. Default: 64.")
    ] = None
    vote: Annotated[Literal["mode", "mean"] | None, Option(help="MoLEx: how tokens vote. Default: mode.")] = (
        None
    )
    vote_score: Annotated[
        Literal["softmax", "sigmoid"] | None,
        Option(help="MoLEx: what the vote 'mean' averages. Default: softmax."),
    ] = None
    top_k: Annotated[int | None, Option(min=1, max=2, help="MoLEx: routed layers per depth. Default: 1.")] = (
        None
    )
    gate_gradient: Annotated[
        Literal["none", "straight_through"] | None,
        Option(help="MoLEx: does the task loss reach the gate? Default: straight_through."),
    ] = None
    balance_coefficient: Annotated[
        float | None, Option(min=0, help="MoLEx: weight of the load-balance loss. Default: 0.01.")
    ] = None
    max_length: Annotated[
        int | None, Option(min=2, help="Longest sequence, in tokens. Default: the base's.")
    ] = None
    max_steps: Annotated[int | None, Option(min=1, help="Stop after so many steps.")] = None
    seed: Annotated[int, Option(min=0)] = 0
    patience: Annotated[int | None, Option(min=1, help="Stop after so many epochs without improvement.")] = (
        None
    )
    metric: Annotated[
        str | None, Option(help="Picks the best epoch. Default: accuracy, pearson or perplexity.")
    ] = None
    dtype: Annotated[Dtype, Option(help="Of the base; the adapter trains in float32.")] = "float32"
    resume: Annotated[bool, Option("--resume", help="Continue from the last checkpoint.")] = False
    threads: Annotated[int | None, Option(min=1, help="CPU threads of torch.")] = None


# Not part of what a run computes: two runs may differ in these and still be the same run.
INCIDENTAL = ("base", "train", "eval", "output", "resume", "threads")

MOLEX_DEFAULTS: dict[str, Any] = {
    "mixed_depths": "all",
    "alpha": 0.95,
    "mix": "fixed",
    "gate": "linear",
    "gate_scope": "shared",
    "vote": "mode",
    "top_k": 1,
    "gate_gradient": "straight_through",
    "balance_coefficient": 0.01,
}
COSINE_PROJECTION_DIM = 64
TARGET_MODULES = {
    "bert": "query,value",
    "roberta": "query,value",
    "gpt2": "c_attn",
    "llama": "q_proj,v_proj",
    "mistral": "q_proj,v_proj",
    "qwen2": "q_proj,v_proj",
}


def complete(arguments: TrainArguments, spec: BaseSpec) -> TrainArguments:
    """The arguments with every default filled in.

    Raises:
        ArgumentError: an option out of range, or one that the method, gate or vote does not use.
    """
    _check_ranges(arguments)
    values: dict[str, Any] = {
        "target_modules": TARGET_MODULES.get(spec.model_type),
        "metric": _metrics(arguments)[0],
        "max_length": spec.max_length,
    }
    if arguments.method == "lora":
        _refuse(arguments, (*MOLEX_DEFAULTS, "projection_dim", "vote_score"), "--method molex")
    else:
        values |= MOLEX_DEFAULTS | _dependent_defaults(arguments)
    missing = {name: v for name, v in values.items() if getattr(arguments, name) is None}
    completed = replace(arguments, **missing)
    _check_fit(completed, spec)
    return completed


def identity(arguments: TrainArguments) -> dict[str, Any]:
    """The arguments that decide what a run computes, as JSON values."""
    return {name: v for name, v in asdict(arguments).items() if name not in INCIDENTAL}


def as_json(arguments: TrainArguments) -> dict[str, Any]:
    """All arguments as JSON values, files and folders by their base names only."""
    values = asdict(arguments)
    files = {name: values[name].name for name in ("train", "eval", "output")}
    return values | files | {"base": base_name(arguments.base)}


def base_name(base: str) -> str:
    """A hub id as it is; of a folder the last part, because the rest is about one machine."""
    path = Path(base)
    return path.resolve().name if path.exists() else base


def adapter_config(arguments: TrainArguments, spec: BaseSpec, labels: list[str] | None) -> AdapterConfig:
    """The configuration that completed arguments describe; `labels` are a classifier's classes."""
    assert arguments.target_modules is not None
    modules = tuple(name.strip() for name in arguments.target_modules.split(","))
    return AdapterConfig(
        task_type=arguments.task_type,
        r=arguments.r,
        lora_alpha=arguments.lora_alpha,
        target_modules=modules,
        lora_dropout=arguments.lora_dropout,
        fan_in_fan_out=spec.model_type == "gpt2",
        problem_type=arguments.problem_type,
        molex=None if arguments.method == "lora" else _molex_config(arguments, spec),
        base_model_name_or_path=base_name(arguments.base),
        id2label=None if labels is None else dict(enumerate(labels)),
    )


def parse_depths(text: str, num_layers: int) -> tuple[int, ...]:
    """The depths that 'all', ranges such as '0-5' and lists such as '0,2,4' name, ascending.

    Raises:
        ArgumentError: not such a text, or a depth that the base does not have.
    """
    if text == "all":
        return tuple(range(num_layers))
    depths: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ArgumentError(f"--mixed-depths {text!r}: use 'all', a range '0-5' or a list '0,2,4'")
        depths.update(range(int(first), int(last if dash else first) + 1))
    if not depths or max(depths) >= num_layers:
        raise ArgumentError(f"--mixed-depths {text!r}: the base has depths 0 to {num_layers - 1}")
    return tuple(sorted(depths))


def _molex_config(arguments: TrainArguments, spec: BaseSpec) -> MolexConfig:
    values = {field.name: getattr(arguments, field.name) for field in fields(arguments)}
    over = "sequence" if arguments.task_type == "SEQ_CLS" else "prompt"
    score = values["vote_score"]
    vote = {"rule": values["vote"], "over": over} | ({"score": score} if score else {})
    return MolexConfig(
        mixed_depths=parse_depths(values["mixed_depths"], spec.num_layers),
        gate=GateConfig(values["gate"], values["gate_scope"], values["projection_dim"]),
        vote=VoteConfig(**vote),
        top_k=values["top_k"],
        gate_gradient=values["gate_gradient"],
        mix=values["mix"],
    )


def _dependent_defaults(arguments: TrainArguments) -> dict[str, Any]:
    """Defaults of the options that only some gates and votes have."""
    defaults: dict[str, Any] = {}
    if arguments.gate == "cosine":
        defaults["projection_dim"] = COSINE_PROJECTION_DIM
    else:
        _refuse(arguments, ("projection_dim",), "--gate cosine")
    if arguments.vote == "mean":
        defaults["vote_score"] = "softmax"
    else:
        _refuse(arguments, ("vote_score",), "--vote mean")
    return defaults


def _refuse(arguments: TrainArguments, names: tuple[str, ...], needs: str) -> None:
    for name in names:
        if getattr(arguments, name) is not None:
            raise ArgumentError(f"{flag(name)} is only used with {needs}")


def _metrics(arguments: TrainArguments) -> tuple[str, ...]:
    """What can pick the best epoch; the first is the default."""
    if arguments.task_type == "CAUSAL_LM":
        return GENERATION
    return REGRESSION if arguments.problem_type == "regression" else CLASSIFICATION


def _check_ranges(arguments: TrainArguments) -> None:
    if not arguments.learning_rate > 0:
        raise ArgumentError("--learning-rate must be above 0")
    if not arguments.lora_alpha > 0:
        raise ArgumentError("--lora-alpha must be above 0")
    if not 0 <= arguments.lora_dropout < 1:
        raise ArgumentError("--lora-dropout must be at least 0 and below 1")
    if arguments.alpha is not None and not 0 < arguments.alpha < 1:
        raise ArgumentError("--alpha must be between 0 and 1")


def _check_fit(arguments: TrainArguments, spec: BaseSpec) -> None:
    """Refuse what the base or the task cannot do."""
    if arguments.problem_type == "regression" and arguments.task_type != "SEQ_CLS":
        raise ArgumentError("--problem-type regression is only used with --task-type SEQ_CLS")
    known = _metrics(arguments)
    if arguments.metric not in known:
        task = "regression" if arguments.problem_type == "regression" else arguments.task_type
        raise ArgumentError(f"--metric {arguments.metric}: {task} has {', '.join(known)}")
    if arguments.task_type == "CAUSAL_LM" and not spec.generates:
        raise ArgumentError(f"--task-type CAUSAL_LM: a {spec.model_type} base does not generate")
    if arguments.target_modules is None:
        raise ArgumentError(f"--target-modules: name them for a {spec.model_type} base")
    assert arguments.max_length is not None
    if arguments.max_length > spec.max_length:
        raise ArgumentError(f"--max-length {arguments.max_length}: the base takes at most {spec.max_length}")


def flag(name: str) -> str:
    """An option as it is typed."""
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Evaluate an adapter on a data file."""

    base: Annotated[str, Option(help="Base model: a folder or hub id.")]
    adapter: Annotated[Path, Option(help="Folder of a MoLEx or LoRA adapter.")]
    data: Annotated[Path, Option(help="Data: .tsv, .csv or .jsonl.")]
    json: Annotated[bool, Option("--json", help="Print one JSON object, nothing else.")] = False
    generate: Annotated[bool, Option(help="CAUSAL_LM: also generate, for BLEU and chrF.")] = True
    max_tokens: Annotated[int, Option(min=1, help="Longest generated text, in tokens.")] = 64
    max_length: Annotated[
        int | None, Option(min=2, help="Longest sequence, in tokens. Default: the base's.")
    ] = None
    dtype: Annotated[Dtype, Option(help="Of the base and the adapter.")] = "float32"
    threads: Annotated[int | None, Option(min=1, help="CPU threads of torch.")] = None
