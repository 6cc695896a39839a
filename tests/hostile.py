"""Adapter folders as an attacker or an accident makes them, each spoilt from a good one."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import re
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from molex.adapter_file import CONFIG_NAME, WEIGHTS_NAME

Spoil = Callable[[Path], None]
GIGABYTE = 10**9


@dataclass(frozen=True)
class Hostile:
    """`spoil` changes a good folder in place; `subject` is what a refusal has to name."""

    spoil: Spoil
    subject: str


def config(**changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / CONFIG_NAME
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def config_text(change: Callable[[str], str]) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / CONFIG_NAME
        path.write_text(change(path.read_text()))

    return spoil


def tensors(change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / WEIGHTS_NAME
        save_file(dict(change(load_file(path))), path)

    return spoil


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    return tensors(lambda found: found | {name: change(found[name]).contiguous()})


def weights(change: Callable[[bytes], bytes]) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / WEIGHTS_NAME
        path.write_bytes(change(path.read_bytes()))

    return spoil


def header(change: Callable[[str], str]) -> Spoil:
    """Change the JSON that the weights begin with; what follows it stays."""

    def changed(content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        text = change(content[8 : 8 + length].decode()).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return weights(changed)


def entries(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Spoil:
    return header(lambda text: json.dumps(change(json.loads(text))))


def entry(name: str, **fields: Any) -> Spoil:
    return entries(lambda found: found | {name: found[name] | fields})


def instead(name: str, make: Callable[[Path], object]) -> Spoil:
    """Put something else into the place of a file."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return spoil


def hole(size: int, beginning: bytes = b"") -> Callable[[Path], None]:
    """A file of which the disk holds next to nothing."""

    def make(path: Path) -> None:
        with path.open("wb") as file:
            file.write(beginning)
            file.truncate(size)

    return make


def giant(size: int) -> Callable[[Path], None]:
    """Weights whose header is right about one tensor that is all of the file."""
    text = json.dumps({"x": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    beginning = struct.pack("<Q", len(text)) + text
    return hole(len(beginning) + size, beginning)


def archive(kind: str) -> Callable[[bytes], bytes]:
    def pack(content: bytes) -> bytes:
        packed = io.BytesIO()
        if kind == "zip":
            with zipfile.ZipFile(packed, "w") as bundle:
                bundle.writestr("../../" + WEIGHTS_NAME, content)
        else:
            with tarfile.open(fileobj=packed, mode="w") as bundle:
                member = tarfile.TarInfo("../../" + WEIGHTS_NAME)
                member.size = len(content)
                bundle.addfile(member, io.BytesIO(content))
        return packed.getvalue()

    return pack


class Exploit:
    """What runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch hostile-pickle-was-run",)


def torch_pickle(path: Path) -> None:
    torch.save({"x": torch.ones(3)}, path)


def loop(path: Path) -> None:
    path.symlink_to(path)


def folder_of_it(path: Path) -> None:
    path.mkdir()


def device(path: Path) -> None:
    """/dev/zero; a link to it where only root may make devices."""
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))
    except PermissionError:
        path.symlink_to("/dev/zero")


def corpus(folder: Path) -> dict[str, Hostile]:
    """Every case by its name, for a good LoRA folder with a head."""
    names = list(load_file(folder / WEIGHTS_NAME))
    a = next(name for name in names if "lora_A" in name)
    b = a.replace("lora_A", "lora_B")
    deep = "[" * 100_000
    nested = "[" * 500 + "]" * 500
    same_place = entries(lambda found: found | {a: found[a] | {"data_offsets": found[b]["data_offsets"]}})
    return {
        "config-missing": Hostile(lambda f: (f / CONFIG_NAME).unlink(), CONFIG_NAME),
        "config-empty": Hostile(config_text(lambda text: ""), CONFIG_NAME),
        "config-truncated": Hostile(config_text(lambda text: text[:-20]), CONFIG_NAME),
        "config-array": Hostile(config_text(lambda text: f"[{text}]"), CONFIG_NAME),
        "config-not-utf8": Hostile(lambda f: (f / CONFIG_NAME).write_bytes(b"\xff\xfe{"), CONFIG_NAME),
        "config-deep": Hostile(config_text(lambda text: deep), CONFIG_NAME),
        "config-twice": Hostile(config_text(lambda text: '{"r": 1,' + text.lstrip()[1:]), CONFIG_NAME),
        "config-number-of-5000-digits": Hostile(
            config_text(lambda text: '{"eva_config": ' + "9" * 5000 + "," + text.lstrip()[1:]), CONFIG_NAME
        ),
        "config-fifo": Hostile(instead(CONFIG_NAME, os.mkfifo), CONFIG_NAME),
        "config-folder": Hostile(instead(CONFIG_NAME, folder_of_it), CONFIG_NAME),
        "config-hole": Hostile(instead(CONFIG_NAME, hole(10 * GIGABYTE)), CONFIG_NAME),
        "rank-huge": Hostile(config(r=10**30), "r"),
        "rank-float": Hostile(config(r=2.0), "r"),
        "rank-true": Hostile(config(r=True), "r"),
        "rank-wrong": Hostile(config(r=3), a),
        "alpha-infinite": Hostile(
            config_text(lambda text: re.sub('"lora_alpha": [^,]+', '"lora_alpha": 1e999', text)),
            "lora_alpha",
        ),
        "alpha-nan": Hostile(config(lora_alpha=float("nan")), "lora_alpha"),
        "targets-pattern": Hostile(config(target_modules="(a+)+$"), "target_modules"),
        "targets-patterns": Hostile(config(target_modules=["(.*)*query", "(a|a)*b"]), "target_modules"),
        "targets-deep": Hostile(config(target_modules=json.loads(nested)), "target_modules"),
        "targets-many": Hostile(
            config(target_modules=["no" + str(n) for n in range(50_000)]), "target_modules"
        ),
        "targets-traversal": Hostile(config(target_modules=["../../query"]), "target_modules"),
        "unknown-field": Hostile(config(surprise=1), "surprise"),
        "unknown-task": Hostile(config(task_type="SEQ_2_SEQ_LM"), "task_type"),
        "unknown-kind": Hostile(config(peft_type="IA3"), "peft_type"),
        "dora": Hostile(config(use_dora=True), "use_dora"),
        "code-from-elsewhere": Hostile(config(custom_module="os.system"), "custom_module"),
        "too-many-labels": Hostile(config(id2label={str(n): "x" for n in range(9999)}), "id2label"),
        "label-surrogate": Hostile(config(id2label=dict.fromkeys("0123", "\ud800")), "id2label"),
        "weights-missing": Hostile(lambda f: (f / WEIGHTS_NAME).unlink(), WEIGHTS_NAME),
        "weights-empty": Hostile(weights(lambda content: b""), WEIGHTS_NAME),
        "weights-truncated": Hostile(weights(lambda content: content[:-1]), WEIGHTS_NAME),
        "weights-longer": Hostile(weights(lambda content: content + b"\0"), WEIGHTS_NAME),
        "weights-fifo": Hostile(instead(WEIGHTS_NAME, os.mkfifo), WEIGHTS_NAME),
        "weights-folder": Hostile(instead(WEIGHTS_NAME, folder_of_it), WEIGHTS_NAME),
        "weights-loop": Hostile(instead(WEIGHTS_NAME, loop), WEIGHTS_NAME),
        "weights-hole": Hostile(instead(WEIGHTS_NAME, hole(10 * GIGABYTE)), WEIGHTS_NAME),
        "weights-hole-within-bounds": Hostile(instead(WEIGHTS_NAME, hole(GIGABYTE)), WEIGHTS_NAME),
        "weights-giant-tensor": Hostile(instead(WEIGHTS_NAME, giant(10 * GIGABYTE)), WEIGHTS_NAME),
        "weights-zip": Hostile(weights(archive("zip")), WEIGHTS_NAME),
        "weights-tar": Hostile(weights(archive("tar")), WEIGHTS_NAME),
        "weights-gzip": Hostile(weights(gzip.compress), WEIGHTS_NAME),
        "weights-pickle": Hostile(weights(lambda content: pickle.dumps(Exploit())), WEIGHTS_NAME),
        "weights-torch": Hostile(instead(WEIGHTS_NAME, torch_pickle), WEIGHTS_NAME),
        "pickle-alone": Hostile(
            lambda f: (f / WEIGHTS_NAME).rename(f / "adapter_model.bin") and None, WEIGHTS_NAME
        ),
        "header-huge": Hostile(weights(lambda content: struct.pack("<Q", 2**63) + content[8:]), WEIGHTS_NAME),
        "header-of-all": Hostile(
            weights(lambda content: struct.pack("<Q", len(content) - 8) + content[8:]), WEIGHTS_NAME
        ),
        "header-deep": Hostile(header(lambda text: deep), WEIGHTS_NAME),
        "header-array": Hostile(header(lambda text: f"[{text}]"), WEIGHTS_NAME),
        "header-twice": Hostile(header(lambda text: text.replace(f'"{b}"', f'"{a}"')), WEIGHTS_NAME),
        "header-no-dtype": Hostile(entry(a, dtype="F99"), WEIGHTS_NAME),
        "header-negative-shape": Hostile(entry(a, shape=[-1, -1]), WEIGHTS_NAME),
        "header-shape-overflows": Hostile(entry(a, shape=[2**63, 2]), WEIGHTS_NAME),
        "offsets-overlap": Hostile(same_place, WEIGHTS_NAME),
        "offsets-backwards": Hostile(entry(a, data_offsets=[8, 0]), WEIGHTS_NAME),
        "offsets-negative": Hostile(entry(a, data_offsets=[-8, 0]), WEIGHTS_NAME),
        "offsets-outside": Hostile(entry(a, data_offsets=[0, 2**40]), WEIGHTS_NAME),
        "offsets-text": Hostile(entry(a, data_offsets=["0", "8"]), WEIGHTS_NAME),
        "offsets-missing": Hostile(entry(a, data_offsets=[]), WEIGHTS_NAME),
        "tensor-nan": Hostile(tensor(a, lambda value: value * float("nan")), a),
        "tensor-infinite": Hostile(tensor(b, lambda value: value / 0), b),
        "tensor-zero": Hostile(tensor(b, torch.zeros_like), b),
        "tensor-integers": Hostile(tensor(a, lambda value: value.long()), a),
        "tensor-complex": Hostile(tensor(a, lambda value: value.to(torch.complex64)), a),
        "tensor-transposed": Hostile(tensor(a, lambda value: value.T), a),
        "tensor-without-size": Hostile(tensor(a, lambda value: value[:0]), a),
        "tensor-missing": Hostile(tensors(lambda found: {k: v for k, v in found.items() if k != a}), a),
        "tensor-traversal": Hostile(
            tensors(lambda found: found | {"../../etc/passwd": torch.ones(1)}), "../../etc/passwd"
        ),
        "tensors-of-a-wider-base": Hostile(
            tensors(
                lambda found: {k: torch.cat([v, v], 1) if "lora_A" in k else v for k, v in found.items()}
            ),
            a,
        ),
        "tensor-other-prefix": Hostile(
            tensors(lambda found: {k.replace("base_model.", "x."): v for k, v in found.items()}),
            "base_model.model.classifier.out_proj.weight",
        ),
    }


def write_corpus(good: Path, root: Path) -> dict[str, str]:
    """Write every case into a folder of its name in `root`; returns what refusals have to name."""
    cases = corpus(good)
    for name, hostile in cases.items():
        shutil.copytree(good, root / name)
        hostile.spoil(root / name)
    return {name: hostile.subject for name, hostile in cases.items()}
