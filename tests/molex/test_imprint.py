"""What is kept of files: it makes the same adapter of the same bytes, and refuses all others."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from molex import AdapterError, imprint, read_adapter, write_adapter
from molex.adapter_file import CONFIG_NAME, WEIGHTS_NAME, parse_adapter, read_files
from molex.imprint import ALIGNMENT, MOST_HEADER_BYTES, Imprint
from tests.molex.test_adapter_file import ENCODER, LAYERS, OUTPUT, VALUE_B
from tests.tiny import molex_config, random_adapter, relabel


@pytest.fixture
def folder(tmp_path):
    adapter = random_adapter(ENCODER, seed=1, molex=molex_config(range(LAYERS)))
    write_adapter(relabel(adapter, ["no", "maybe", "yes"]), tmp_path)
    return tmp_path


def imprint_of(folder):
    files = read_files(folder)
    return Imprint.of(files, parse_adapter(files, ENCODER))


def store_as(folder, dtypes):
    """Write the weights anew, those of a name in `dtypes` in that precision, the others in that of ''."""
    tensors = load_file(folder / WEIGHTS_NAME)
    save_file({n: t.to(dtypes.get(n, dtypes[""])) for n, t in tensors.items()}, folder / WEIGHTS_NAME)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_same_files_give_the_same_adapter(folder, stored, dtype):
    store_as(folder, {"": stored})
    first, again = read_adapter(folder, ENCODER, dtype), imprint_of(folder).read(folder, ENCODER, dtype)
    assert (again.config, again.digest, again.nbytes) == (first.config, first.digest, first.nbytes)
    assert again.tensors.keys() == first.tensors.keys()
    for name, tensor in again.tensors.items():
        assert tensor.dtype == torch.promote_types(dtype, torch.float32)
        assert tensor.stride() == first.tensors[name].stride()
        assert torch.equal(tensor, first.tensors[name])


def test_adapters_of_one_imprint_share_no_memory(folder):
    kept = imprint_of(folder)
    first, second = (kept.read(folder, ENCODER) for _ in range(2))
    first.tensors[VALUE_B].zero_()
    assert second.tensors[VALUE_B].any()


def test_values_are_aligned(folder):
    adapter = imprint_of(folder).read(folder, ENCODER)
    assert min(tensor.data_ptr() for tensor in adapter.tensors.values()) % ALIGNMENT == 0


def refusal(kept, folder):
    with pytest.raises(AdapterError) as caught:
        kept.read(folder, ENCODER)
    return str(caught.value)


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_any_other_byte_is_noticed(folder, name):
    kept, content = imprint_of(folder), (folder / name).read_bytes()
    for place in (0, len(content) // 2, len(content) - 1):
        (folder / name).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert refusal(kept, folder) == "digest: the files have changed since they were loaded"
    (folder / name).write_bytes(content)
    assert kept.read(folder, ENCODER).digest == read_files(folder).digest


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: content + b" "])
def test_another_size_is_noticed(folder, name, change):
    kept = imprint_of(folder)
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    assert refusal(kept, folder) == "digest: the files have changed since they were loaded"


def test_bytes_that_have_moved_from_one_file_to_the_other_are_noticed(folder):
    kept = imprint_of(folder)
    config, weights = ((folder / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME))
    (folder / CONFIG_NAME).write_bytes(config + weights[:1])
    (folder / WEIGHTS_NAME).write_bytes(weights[1:])
    assert refusal(kept, folder) == "digest: the files have changed since they were loaded"


def test_a_file_that_shrinks_while_it_is_read_is_noticed(folder, monkeypatch):
    kept, opened = imprint_of(folder), imprint.opened

    def opened_short(*place):
        (folder / WEIGHTS_NAME).write_bytes((folder / WEIGHTS_NAME).read_bytes()[:-1])
        return opened(*place)

    (folder / WEIGHTS_NAME).write_bytes((folder / WEIGHTS_NAME).read_bytes() + b"\0")
    kept._sizes = kept._sizes[0], kept._sizes[1] + 1
    monkeypatch.setattr(imprint, "opened", opened_short)
    assert refusal(kept, folder) == "digest: the files have changed since they were loaded"


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_missing_file_is_named(folder, name):
    kept = imprint_of(folder)
    (folder / name).unlink()
    assert refusal(kept, folder) == f"{name}: cannot be read (No such file or directory)"


def test_files_of_one_recipe_share_a_layout(folder, tmp_path):
    write_adapter(random_adapter(ENCODER, seed=2, molex=molex_config(range(LAYERS))), tmp_path / "other")
    first, other = imprint_of(folder), imprint_of(tmp_path / "other")
    assert first._layout is other._layout
    store_as(folder, {"": torch.float16})
    assert imprint_of(folder)._layout is not other._layout


def test_there_is_none_where_an_adapter_would_take_much_more_memory_than_its_tensors(folder):
    weights = (folder / WEIGHTS_NAME).read_bytes()
    length = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + length])
    for size, there in ((MOST_HEADER_BYTES, True), (MOST_HEADER_BYTES + 8, False)):
        text = json.dumps(header).encode().ljust(size)
        (folder / WEIGHTS_NAME).write_bytes(size.to_bytes(8, "little") + text + weights[8 + length :])
        assert (imprint_of(folder) is not None) == there
    (folder / WEIGHTS_NAME).write_bytes(weights)
    store_as(folder, {"": torch.float16, OUTPUT: torch.float32})
    assert imprint_of(folder) is None
