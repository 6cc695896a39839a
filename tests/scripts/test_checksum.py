import torch
from safetensors.torch import save_file

from scripts.checksum import tensor_digest

TENSORS = {"a": torch.arange(6.0), "b": torch.ones(2, 3, dtype=torch.bfloat16)}


def digest(tmp_path, tensors, metadata=None):
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    return tensor_digest(tmp_path / "model.safetensors")


def test_metadata_and_order_do_not_matter(tmp_path):
    reversed_order = dict(reversed(TENSORS.items()))
    assert digest(tmp_path, TENSORS) == digest(tmp_path, reversed_order, {"format": "pt"})


def test_name_dtype_shape_and_values_matter(tmp_path):
    others = (
        {"c": TENSORS["a"], "b": TENSORS["b"]},
        TENSORS | {"a": TENSORS["a"].view(torch.int32)},
        TENSORS | {"a": TENSORS["a"].reshape(2, 3)},
        TENSORS | {"a": TENSORS["a"] + 1},
    )
    assert len({digest(tmp_path, tensors) for tensors in (TENSORS, *others)}) == 5
