import json

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.smollm_base import convert

HIDDEN, HEADS, KV_HEADS, FEED_FORWARD, POSITIONS = 16, 2, 1, 32, 64
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "g", "o", "d", "go", "od", "good", "Ġ"]
SHAPES = {
    "token_embd.weight": (len(TOKENS), HIDDEN),
    "output_norm.weight": (HIDDEN,),
    "blk.0.attn_norm.weight": (HIDDEN,),
    "blk.0.ffn_norm.weight": (HIDDEN,),
    "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
    "blk.0.attn_k.weight": (HIDDEN // 2, HIDDEN),
    "blk.0.attn_v.weight": (HIDDEN // 2, HIDDEN),
    "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
    "blk.0.ffn_gate.weight": (FEED_FORWARD, HIDDEN),
    "blk.0.ffn_up.weight": (FEED_FORWARD, HIDDEN),
    "blk.0.ffn_down.weight": (HIDDEN, FEED_FORWARD),
}


def write_gguf(path, tensors):
    """A Llama of one layer with a byte-level BPE tokenizer, unquantised."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_context_length(POSITIONS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["g o", "o d", "go od"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def tensors():
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tensors):
    root = tmp_path_factory.mktemp("smollm")
    write_gguf(root / "tiny.gguf", tensors)
    convert(root / "tiny.gguf", root / "model")
    return root / "model"


def test_weights_are_stored_in_half_and_loaded_in_single_precision(folder, tensors):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    stored = torch.from_numpy(tensors["blk.0.ffn_down.weight"]).half().float()
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, stored)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_config_keeps_the_shape_and_drops_the_quantisation(folder):
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_parameters"]["rope_theta"] == 100000.0
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (HEADS, KV_HEADS)
    assert config["eos_token_id"] == 2


def test_the_tokenizer_comes_along_with_its_chat_template(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("good<|im_end|>").input_ids == [8, 2]
    assert tokenizer.model_max_length == POSITIONS
    messages = [{"role": "user", "content": "good"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "good"
