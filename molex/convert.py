"""From a checkpoint folder of the official MoLEx code to an adapter folder and a transformers base.

Official checkpoints hold the whole model. Their trainer *merges* the low-rank updates into the weights
before it saves and keeps the factors beside them, so the base of a trained checkpoint should come from the
pristine model; `base_out` writes the checkpoint's own weights, which is right where they were not merged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, RobertaConfig, RobertaModel

from molex.adapter import MIX, PEFT_PREFIX, assemble, gate_stems, lora_names
from molex.adapter_file import read_adapter, write_adapter
from molex.backbone import Backbone, BaseSpec
from molex.config import AdapterConfig, GateConfig, MolexConfig, VoteConfig
from molex.errors import MolexError

Weights = dict[str, Tensor]
Fields = Mapping[str, Any]

GATE_NAMES = {
    "weight": "weight",
    "bias": "bias",
    "projector.weight": "cosine_projector.weight",
    "projector.bias": "cosine_projector.bias",
    "similarity": "sim_matrix",
    "temperature": "temperature",
}
"""Gate tensors: our name → the official one."""


class ConversionError(MolexError):
    """A checkpoint folder that cannot be converted; the message names the file, field or tensor."""


@dataclass(frozen=True)
class _Layout:
    """What differs between the official code of the two families."""

    model: Callable[[Fields, Weights], PreTrainedModel]
    stack: str
    """Where gate and mixing weights that all depths share are found."""
    block: str
    lora: Callable[[Fields, BaseSpec, Weights], tuple[AdapterConfig, Weights]]
    cosine_field: str
    last_depth_offset: int
    """Depths below layers_to_use + this offset are mixed."""
    unsupported: tuple[str, ...]


def convert(source: str | Path, output: str | Path, base_out: str | Path | None = None) -> None:
    """Write the adapter of the checkpoint folder `source` to `output` and, if asked, its base to `base_out`.

    Raises ConversionError for a folder in another layout and AdapterError for an adapter that would not load.
    """
    fields, weights, layout = _read_checkpoint(Path(source))
    for name in layout.unsupported:
        if fields.get(name):
            raise ConversionError(f"config.json: {name} is not supported")
    model = layout.model(fields, weights)
    if base_out is not None:
        model.save_pretrained(base_out)
    spec = Backbone(model).spec
    config, tensors = layout.lora(fields, spec, weights)
    if fields.get("use_gate"):
        molex = _molex_config(fields, spec, layout, weights)
        tensors |= _molex_tensors(fields, molex, layout, weights)
        config = AdapterConfig(**{**vars(config), "molex": molex})
    write_adapter(assemble(config, spec, tensors), output)
    read_adapter(output, spec)


def _read_checkpoint(source: Path) -> tuple[Fields, Weights, _Layout]:
    try:
        fields = json.loads((source / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConversionError(f"{source.name}/config.json: cannot be read ({error})") from error
    if not isinstance(fields, dict):
        raise ConversionError(f"{source.name}/config.json: not a JSON object")
    for name, layout in (("pytorch_model.bin", ROBERTA), ("model.pt", GPT2)):
        if (source / name).is_file():
            return fields, _read_weights(source / name), layout
    raise ConversionError(f"{source.name}: neither pytorch_model.bin nor model.pt is there")


def _read_weights(path: Path) -> Weights:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or malicious file
        raise ConversionError(f"{path.name}: cannot be read as plain weights ({error})") from error
    if isinstance(state, dict):
        state = state.get("model_state_dict", state)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ConversionError(f"{path.name}: does not hold tensors by name")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _get(weights: Weights, name: str) -> Tensor:
    if name not in weights:
        raise ConversionError(f"{name}: missing in the checkpoint")
    return weights[name]


def _number(fields: Fields, name: str) -> Any:
    if name not in fields:
        raise ConversionError(f"config.json: {name} is missing")
    if type(fields[name]) not in (int, float):
        raise ConversionError(f"config.json: {name} is not a number")
    return fields[name]


def _roberta_model(fields: Fields, weights: Weights) -> PreTrainedModel:
    known = RobertaConfig().to_dict()
    dropped = {"model_type", "transformers_version", "architectures", "dtype"}
    config = RobertaConfig(**{k: v for k, v in fields.items() if k in known and k not in dropped})
    model = RobertaModel(config, add_pooling_layer=False)
    return _fill(model, weights, "roberta.")


def _gpt2_model(fields: Fields, weights: Weights) -> PreTrainedModel:
    sizes = {name: _number(fields, name) for name in ("n_positions", "n_embd", "n_layer", "n_head")}
    config = GPT2Config(
        vocab_size=len(_get(weights, "transformer.wte.weight")), bos_token_id=None, eos_token_id=None, **sizes
    )
    tied = _get(weights, "lm_head.decoder.weight")
    if not torch.equal(tied, weights["transformer.wte.weight"]):
        raise ConversionError("lm_head.decoder.weight: differs from transformer.wte.weight, expected tied")
    return _fill(GPT2LMHeadModel(config), weights | {"lm_head.weight": tied}, "")


def _fill(model: PreTrainedModel, weights: Weights, prefix: str) -> PreTrainedModel:
    """Load the checkpoint's tensors that the stock model has. The others are the adapter's."""
    filled: Weights = {}
    for name, tensor in model.state_dict().items():
        filled[name] = _get(weights, prefix + name)
        if filled[name].shape != tensor.shape:
            shapes = f"has shape {list(filled[name].shape)}, expected {list(tensor.shape)}"
            raise ConversionError(f"{prefix}{name}: {shapes}")
    model.load_state_dict(filled)
    return model.eval()


def _roberta_lora(fields: Fields, spec: BaseSpec, weights: Weights) -> tuple[AdapterConfig, Weights]:
    num_labels = len(weights.get("classifier.out_proj.bias", ()))
    config = AdapterConfig(
        task_type="SEQ_CLS",
        r=_number(fields, "lora_r"),
        lora_alpha=float(_number(fields, "lora_alpha")),
        target_modules=("query", "value"),
        # The official code gives a model one output for regression, and for nothing else.
        problem_type="regression" if num_labels == 1 else "single_label_classification",
    )
    tensors = {PEFT_PREFIX + name: t for name, t in weights.items() if name.startswith("classifier.")}
    for layer in range(spec.num_layers):
        for module in ("attention.self.query", "attention.self.value"):
            official = f"{spec.prefix}.{layer}.{module}"
            a, b = lora_names(spec, (layer, module))
            tensors[a] = _get(weights, f"{official}.lora_A")
            tensors[b] = _get(weights, f"{official}.lora_B")
    return config, tensors


def _gpt2_lora(fields: Fields, spec: BaseSpec, weights: Weights) -> tuple[AdapterConfig, Weights]:
    """The official code adapts the query and value thirds of c_attn with a factor pair each.

    One pair of twice the rank says the same: A stacks both, B places each in its own third. Twice the
    lora_alpha keeps the scaling.
    """
    rank, size = _number(fields, "lora_attn_dim"), spec.hidden_size
    alpha = 2.0 * _number(fields, "lora_attn_alpha")
    config = AdapterConfig(
        task_type="CAUSAL_LM",
        r=2 * rank,
        lora_alpha=alpha,
        target_modules=("attn.c_attn",),
        fan_in_fan_out=True,
    )
    tensors: Weights = {}
    for layer in range(spec.num_layers):
        official = _get(weights, f"transformer.h.{layer}.attn.c_attn.lora_B")
        b = official.new_zeros(3 * size, 2 * rank)
        b[:size, :rank], b[2 * size :, rank:] = official[:size], official[size:]
        a_name, b_name = lora_names(spec, (layer, "attn.c_attn"))
        tensors[a_name] = _get(weights, f"transformer.h.{layer}.attn.c_attn.lora_A")
        tensors[b_name] = b
    return config, tensors


def _molex_config(fields: Fields, spec: BaseSpec, layout: _Layout, weights: Weights) -> MolexConfig:
    last = min(_number(fields, "layers_to_use") + layout.last_depth_offset, spec.num_layers)
    cosine = bool(fields.get(layout.cosine_field))
    return MolexConfig(
        mixed_depths=tuple(range(last)),
        gate=GateConfig(
            kind="cosine" if cosine else "linear",
            scope="depth" if fields.get("use_indv_gate") else "shared",
            projection_dim=_number(fields, "proj_dim") if cosine else None,
            normalize="sequence" if cosine else "features",
        ),
        vote=VoteConfig(rule="mean" if fields.get("mean_mode") else "mode"),
        mix="learned" if fields.get("use_learn_weight") else "fixed",
        mix_scope="depth" if f"{layout.block}.0.weight_main" in weights else "shared",
    )


def _molex_tensors(fields: Fields, molex: MolexConfig, layout: _Layout, weights: Weights) -> Weights:
    tensors: Weights = {}
    for depth, stem in gate_stems(molex).items():
        official = f"{layout.stack}.gate" if molex.gate.scope == "shared" else f"{layout.block}.{depth}.gate"
        for name, official_name in GATE_NAMES.items():
            if ("." in name or name in ("similarity", "temperature")) == (molex.gate.kind == "cosine"):
                tensors[f"{stem}.{name}"] = _get(weights, f"{official}.{official_name}")
    tensors[MIX] = torch.stack([_pair(fields, layout, depth, weights) for depth in molex.mixed_depths])
    return tensors


def _pair(fields: Fields, layout: _Layout, depth: int, weights: Weights) -> Tensor:
    """(w_own, w_routed) [2] of one depth."""
    if not fields.get("use_learn_weight"):
        return torch.tensor([_number(fields, "weight_main_init"), _number(fields, "weight_other_init")])
    own = f"{layout.block}.{depth}"
    scope = own if f"{own}.weight_main" in weights else layout.stack
    raw = torch.cat([_get(weights, f"{scope}.weight_{which}") for which in ("main", "other")])
    # The official GPT-2 multiplies by the two scalars themselves where all depths share them.
    return raw if layout is GPT2 and scope == layout.stack else raw.softmax(dim=0)


ROBERTA = _Layout(
    model=_roberta_model,
    stack="roberta.encoder",
    block="roberta.encoder.layer",
    lora=_roberta_lora,
    cosine_field="expert_choice",
    last_depth_offset=1,
    unsupported=("apply_adapter", "apply_bitfit", "use_pos_emb"),
)
GPT2 = _Layout(
    model=_gpt2_model,
    stack="transformer",
    block="transformer.h",
    lora=_gpt2_lora,
    cosine_field="cosine_gate",
    last_depth_offset=0,
    unsupported=("sig_sft",),
)
