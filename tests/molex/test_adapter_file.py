"""Adapter folders: what is written is read back, and whatever is wrong with a folder is named."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from molex import AdapterError, read_adapter, write_adapter
from molex.adapter import assemble, new_adapter
from molex.adapter_file import CONFIG_NAME, WEIGHTS_NAME
from molex.backbone import BaseSpec
from molex.config import GateConfig, MolexConfig, VoteConfig
from tests.tiny import adapter_config, molex_config, random_adapter, relabel

# Bases so small that reading an adapter takes less than a millisecond. No model stands behind them.
SIZE, LAYERS = 4, 3
ENCODER = BaseSpec(
    model_type="roberta",
    num_layers=LAYERS,
    hidden_size=SIZE,
    vocab_size=10,
    token_types=1,
    max_length=16,
    modules={"attention.self.query": (SIZE, SIZE), "attention.self.value": (SIZE, SIZE)},
    prefix="roberta.encoder.layer",
    head="roberta",
    generates=False,
    has_pooler=False,
    digest="sha256:0",
)
BERT = replace(ENCODER, model_type="bert", prefix="bert.encoder.layer", head="bert", has_pooler=True)
DECODER = replace(
    ENCODER,
    model_type="llama",
    modules={"self_attn.q_proj": (SIZE, SIZE), "self_attn.v_proj": (SIZE, 2), "mlp.down_proj": (6, SIZE)},
    prefix="model.layers",
    head="score",
    generates=True,
)
SPECS = {"roberta": ENCODER, "bert": BERT, "llama": DECODER}
QUERY_A = "base_model.model.roberta.encoder.layer.1.attention.self.query.lora_A.weight"
VALUE_B = "base_model.model.roberta.encoder.layer.2.attention.self.value.lora_B.weight"
OUTPUT = "base_model.model.classifier.out_proj.weight"

mixtures = st.builds(
    MolexConfig,
    mixed_depths=st.sets(st.integers(0, LAYERS - 1), min_size=1).map(lambda chosen: tuple(sorted(chosen))),
    gate=st.one_of(
        st.builds(GateConfig, scope=st.sampled_from(["shared", "depth"])),
        st.builds(
            GateConfig,
            kind=st.just("cosine"),
            scope=st.sampled_from(["shared", "depth"]),
            projection_dim=st.integers(1, 5),
            normalize=st.sampled_from(["features", "sequence"]),
        ),
    ),
    vote=st.builds(VoteConfig, rule=st.sampled_from(["mode", "mean"])),
    top_k=st.sampled_from([1, 2]),
    mix=st.sampled_from(["fixed", "learned"]),
    mix_scope=st.sampled_from(["shared", "depth"]),
)


@settings(max_examples=60)
@given(
    family_and_task=st.sampled_from([*product(SPECS, ["SEQ_CLS"]), ("llama", "CAUSAL_LM")]),
    molex=st.one_of(st.none(), mixtures),
    rank=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_what_is_written_is_read_back(tmp_path_factory, family_and_task, molex, rank, dtype, seed):
    family, task = family_and_task
    spec, folder = SPECS[family], tmp_path_factory.mktemp("adapter")
    adapter = random_adapter(spec, seed=seed, dtype=dtype, task=task, r=rank, molex=molex, num_labels=3)
    write_adapter(adapter, folder)
    read = read_adapter(folder, spec, dtype)
    assert read.config == adapter.config
    kept = {name for name in adapter.tensors if name != "molex.mix_logits"}
    assert kept <= set(read.tensors) <= kept | {"molex.mix"}
    for name in kept:
        assert torch.equal(read.tensors[name], adapter.tensors[name])
    if molex is not None:
        torch.testing.assert_close(read.mixing_pairs(), adapter.mixing_pairs())


def test_equal_adapters_are_written_to_equal_files(tmp_path):
    adapter = random_adapter(BERT, seed=1)
    backwards = dict(reversed(adapter.tensors.items()))
    write_adapter(adapter, tmp_path / "one")
    write_adapter(assemble(adapter.config, BERT, backwards), tmp_path / "other")
    assert read_adapter(tmp_path / "one", BERT).digest == read_adapter(tmp_path / "other", BERT).digest


@pytest.fixture
def folder(tmp_path):
    adapter = random_adapter(ENCODER, seed=1, molex=molex_config(range(LAYERS)))
    write_adapter(relabel(adapter, ["no", "maybe", "yes"]), tmp_path)
    return tmp_path


def test_the_digest_is_that_of_both_files(folder):
    parts = [hashlib.sha256((folder / name).read_bytes()).digest() for name in (CONFIG_NAME, WEIGHTS_NAME)]
    expected = "sha256:" + hashlib.sha256(parts[0] + parts[1]).hexdigest()
    assert read_adapter(folder, ENCODER).digest == expected
    with (folder / CONFIG_NAME).open("a") as file:
        file.write(" ")
    assert read_adapter(folder, ENCODER).digest != expected


def test_writing_leaves_the_two_files_and_nothing_else(folder):
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]


@pytest.mark.parametrize("kept", [torch.float32, torch.float64, torch.bfloat16])
def test_adapters_are_kept_in_no_less_than_float32(folder, kept):
    dtypes = {tensor.dtype for tensor in read_adapter(folder, ENCODER, kept).tensors.values()}
    assert dtypes == {torch.promote_types(kept, torch.float32)}


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_files_may_store_any_floating_point(folder, stored):
    change_tensors(folder, lambda tensors: {name: t.to(stored) for name, t in tensors.items()})
    assert read_adapter(folder, ENCODER).tensors[QUERY_A].dtype == torch.float32


def change_tensors(folder, change):
    save_file(change(load_file(folder / WEIGHTS_NAME)), folder / WEIGHTS_NAME)


def change_config(folder, **changes):
    fields = json.loads((folder / CONFIG_NAME).read_text()) | changes
    (folder / CONFIG_NAME).write_text(json.dumps(fields))


def refusal(folder, subject, spec=ENCODER):
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder, spec)
    assert caught.value.subject == subject
    assert str(caught.value).startswith(f"{subject}: ")
    return str(caught.value)


def replaced(name, tensor):
    return lambda tensors: tensors | {name: tensor}


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert "cannot be read (No such file or directory)" in refusal(folder, name)


def test_a_missing_folder_and_a_file_in_its_place(tmp_path):
    refusal(tmp_path / "nowhere", CONFIG_NAME)
    (tmp_path / "file").write_text("")
    refusal(tmp_path / "file", CONFIG_NAME)


def test_a_pickle_is_never_read(folder):
    (folder / WEIGHTS_NAME).rename(folder / "adapter_model.bin")
    assert "adapter_model.bin is a pickle, which is never read" in refusal(folder, WEIGHTS_NAME)


@pytest.mark.parametrize(
    "name",
    ["surprise", QUERY_A.replace("layer.1", "layer.3"), "molex.mix_logits", QUERY_A.replace("query", "key")],
)
def test_an_unknown_tensor_is_named(folder, name):
    change_tensors(folder, replaced(name, torch.ones(1, 2)))
    assert "unknown tensor for a molex adapter on roberta" in refusal(folder, name)


def test_every_missing_tensor_is_named(folder):
    whole = load_file(folder / WEIGHTS_NAME)
    for name in whole:
        save_file({k: t for k, t in whole.items() if k != name}, folder / WEIGHTS_NAME)
        assert "missing in adapter_model.safetensors" in refusal(folder, name)


def test_every_misshapen_tensor_is_named(folder):
    whole = load_file(folder / WEIGHTS_NAME)
    for name, tensor in whole.items():
        if name == OUTPUT:
            continue  # it says how many labels there are
        save_file(whole | {name: torch.ones(*tensor.shape, 1)}, folder / WEIGHTS_NAME)
        assert f"expected {list(tensor.shape)}" in refusal(folder, name)


@pytest.mark.parametrize("shape", [(), (3,), (3, SIZE + 1), (3, SIZE, 1)], ids=str)
def test_a_misshapen_output_layer_is_refused(folder, shape):
    change_config(folder, id2label=None)
    change_tensors(folder, replaced(OUTPUT, torch.ones(shape)))
    with pytest.raises(AdapterError, match=r"expected|has no labels"):
        read_adapter(folder, ENCODER)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused_wherever_it_is(folder, value):
    whole = load_file(folder / WEIGHTS_NAME)
    for name, tensor in whole.items():
        broken = tensor.clone()
        broken.view(-1)[-1] = value
        save_file(whole | {name: broken}, folder / WEIGHTS_NAME)
        assert "has values that are not finite" in refusal(folder, name)


def test_a_value_that_float32_cannot_hold_is_refused(folder):
    change_tensors(folder, lambda tensors: tensors | {QUERY_A: tensors[QUERY_A].double() * 1e300})
    refusal(folder, QUERY_A)


def test_values_that_vanish_in_float32_have_no_effect(folder):
    change_tensors(folder, lambda tensors: tensors | {QUERY_A: tensors[QUERY_A].double() * 1e-300})
    assert "has no effect" in refusal(folder, QUERY_A)


@pytest.mark.parametrize("name", [QUERY_A, VALUE_B])
def test_an_update_of_zero_is_refused(folder, name):
    change_tensors(folder, lambda tensors: tensors | {name: torch.zeros_like(tensors[name])})
    assert "has no effect: every value is 0" in refusal(folder, name)


def test_a_mixture_that_never_mixes_is_refused(folder):
    change_tensors(folder, replaced("molex.mix", torch.tensor([[1.0, 0.0]] * LAYERS)))
    assert "every w_routed is 0" in refusal(folder, "molex.mix")


def test_a_fresh_adapter_has_no_effect_yet(tmp_path):
    write_adapter(new_adapter(ENCODER, adapter_config(ENCODER), num_labels=2, seed=1), tmp_path)
    with pytest.raises(AdapterError, match=r"lora_B.weight: has no effect"):
        read_adapter(tmp_path, ENCODER)


INTEGERS = [torch.int8, torch.int32, torch.int64, torch.bool, torch.uint16, torch.complex64]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_other_dtypes_than_floating_point_are_refused(folder, dtype):
    change_tensors(folder, lambda tensors: tensors | {QUERY_A: torch.ones(4, SIZE).to(dtype)})
    assert "expected floating point" in refusal(folder, QUERY_A)


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fn], ids=str)
def test_float8_is_refused(folder, dtype):
    change_tensors(folder, lambda tensors: tensors | {QUERY_A: torch.ones(4, SIZE).to(dtype)})
    refusal(folder, QUERY_A)


def test_a_head_without_labels_is_refused(folder):
    change_config(folder, id2label=None)
    empty = {OUTPUT: torch.zeros(0, SIZE), OUTPUT.replace("weight", "bias"): torch.zeros(0)}
    change_tensors(folder, lambda tensors: tensors | empty)
    refusal(folder, OUTPUT)


def test_labels_are_counted(folder):
    change_config(folder, id2label={"0": "no", "1": "yes"})
    assert "2 names for 3 labels" in refusal(folder, "id2label")


def test_a_regression_has_one_output(folder):
    change_config(folder, problem_type="regression", id2label=None)
    assert "one output, but the head has 3" in refusal(folder, "problem_type")


def test_a_generator_has_no_place_on_an_encoder(folder):
    change_config(folder, task_type="CAUSAL_LM")
    assert "needs a decoder, but the base is roberta" in refusal(folder, "task_type")


def test_a_head_on_a_generator_is_unknown(tmp_path):
    write_adapter(random_adapter(DECODER, seed=1), tmp_path)
    change_config(tmp_path, task_type="CAUSAL_LM")
    refusal(tmp_path, "base_model.model.score.weight", DECODER)


def test_a_bert_head_needs_a_pooler_from_somewhere(tmp_path):
    adapter = random_adapter(BERT, seed=1)
    bare = {name: tensor for name, tensor in adapter.tensors.items() if "pooler" not in name}
    write_adapter(assemble(adapter.config, BERT, bare), tmp_path)
    assert "bert.pooler.dense.weight" not in (read_adapter(tmp_path, BERT).head or adapter.head).tensors
    message = refusal(tmp_path, "base_model.model.bert.pooler.dense.weight", replace(BERT, has_pooler=False))
    assert "the base model has no pooler" in message


def test_half_a_pooler_is_refused(tmp_path):
    write_adapter(random_adapter(BERT, seed=1), tmp_path)
    name = "base_model.model.bert.pooler.dense.bias"
    change_tensors(tmp_path, lambda tensors: {k: t for k, t in tensors.items() if k != name})
    refusal(tmp_path, name, BERT)


WRONG_BASES = {
    "another family": DECODER,
    "another width": replace(
        ENCODER, hidden_size=8, modules={"attention.self.query": (8, 8), "attention.self.value": (8, 8)}
    ),
    "fewer layers": replace(ENCODER, num_layers=2),
    "more layers": replace(ENCODER, num_layers=4),
}


@pytest.mark.parametrize("base", WRONG_BASES)
def test_an_adapter_of_another_base_is_refused(folder, base):
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder, WRONG_BASES[base])
    assert caught.value.subject


@pytest.mark.parametrize("keep", [0, 4, 8, 20, -1])
def test_a_truncated_file_is_refused(folder, keep):
    path = folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:keep])
    assert "not a safetensors file" in refusal(folder, WEIGHTS_NAME)


@pytest.mark.parametrize("length", [0, 2**20, 2**40, 2**63, 2**64 - 1])
def test_a_header_of_impossible_length_is_refused(folder, length):
    path = folder / WEIGHTS_NAME
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    refusal(folder, WEIGHTS_NAME)


HEADERS = [
    "",
    "{",
    "[]",
    "null",
    '{"a": 1}',
    '{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}',
    '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}',
    '{"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}',
    '{"a": {"dtype": "F32", "shape": [18446744073709551615, 2], "data_offsets": [0, 8]}}',
    '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "F32"}}',
]


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_a_garbage_header_is_refused(folder, header):
    content = struct.pack("<Q", len(header)) + header.encode() + bytes(8)
    (folder / WEIGHTS_NAME).write_bytes(content)
    refusal(folder, WEIGHTS_NAME)


def read_or_named(folder):
    """A damaged folder either loads whole or is refused by name; any other exception fails the test."""
    tensors, subject = {}, None
    try:
        tensors = read_adapter(folder, ENCODER).tensors
    except AdapterError as error:
        subject = error.subject
    assert tensors or subject
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.fixture(scope="module")
def valid_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("valid")
    adapter = random_adapter(ENCODER, seed=1, r=1, molex=molex_config([0, 2]))
    write_adapter(relabel(adapter, ["no", "maybe", "yes"]), folder)
    return {name: (folder / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME)}


def mutate(content, edits):
    """Overwrite, insert or cut at places given as a share of the length."""
    changed = bytearray(content)
    for kind, share, new in edits:
        at = int(share * len(changed))
        if kind == "cut":
            del changed[at : at + len(new)]
        else:
            changed[at : at + (len(new) if kind == "overwrite" else 0)] = new
    return bytes(changed)


edits = st.lists(
    st.tuples(
        st.sampled_from(["overwrite", "insert", "cut"]),
        # Half of the edits hit the first part of the file, where the header is.
        st.one_of(st.floats(0, 1, exclude_max=True), st.floats(0, 0.05)),
        st.binary(min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=300)
@given(name=st.sampled_from([CONFIG_NAME, WEIGHTS_NAME]), edits=edits)
def test_damaged_files_are_read_or_refused_by_name(tmp_path_factory, valid_files, name, edits):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    for file, content in valid_files.items():
        (folder / file).write_bytes(mutate(content, edits) if file == name else content)
    read_or_named(folder)


entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "I64", "BOOL", "C64", "F99", 1, None]),
        "shape": st.lists(st.one_of(st.integers(-1, 9), st.integers()), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 400), max_size=3),
    },
)


@settings(max_examples=200)
@given(edits=st.dictionaries(st.integers(0, 200), entries, min_size=1, max_size=3))
def test_edited_headers_are_read_or_refused_by_name(tmp_path_factory, valid_files, edits):
    content = valid_files[WEIGHTS_NAME]
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    for number, entry in edits.items():
        header[names[number % len(names)]] |= entry
    text = json.dumps(header).encode()
    folder = tmp_path_factory.getbasetemp() / "edited"
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_NAME).write_bytes(valid_files[CONFIG_NAME])
    (folder / WEIGHTS_NAME).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    read_or_named(folder)
