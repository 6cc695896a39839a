"""Write a base model with its layers as ONNX graphs, once, into a folder that can be served as it is."""

from __future__ import annotations

from pathlib import Path

import torch

from molex.backbone import Backbone
from molex.backends import Wanted, graphs_of
from molex.errors import MolexError
from molex.exported import PRECISIONS, Exported, Precision, write_about, write_graphs
from molex.folders import write_whole
from molex.layers import StockLayers
from molex.stock import load_stock
from molex.tokenizer import load_tokenizer


class ExportError(MolexError):
    """An output folder cannot be written."""


def export(
    base: str | Path, output: Path, precision: Precision, routed_precision: Precision | None = None
) -> None:
    """Write the base to the new folder `output`, with layers as graphs, two a layer (`molex/exported.py`).

    Routed layers have the precision of the others by default, else a second copy. Raises ExportError, and
    BaseModelError for a base that cannot be loaded or exported; nothing is left then.
    """
    if output.exists():
        raise ExportError(f"{output} exists already")
    routed = routed_precision or precision
    by_size = list(PRECISIONS)
    if by_size.index(routed) < by_size.index(precision):
        raise ExportError(f"routed layers cannot be in {routed} where the others are in {precision}")
    model, has_pooler = load_stock(base, torch.float32)
    if not has_pooler and hasattr(model, "pooler"):
        model.pooler = None  # Made up by transformers: the base has none.
    backbone = Backbone(model, has_pooler=has_pooler)
    stock = backbone.layers
    assert isinstance(stock, StockLayers)
    bits, routed_bits = PRECISIONS[precision], PRECISIONS[routed]
    layers, vocabulary = graphs_of(Wanted(stock, backbone.family, backbone.config, bits, routed_bits))
    in_layers = {id(tensor) for block in stock.blocks for tensor in block.parameters()}
    state = model.state_dict(keep_vars=True)

    def write(folder: Path) -> None:
        outside = {name: tensor for name, tensor in state.items() if id(tensor) not in in_layers}
        model.save_pretrained(folder, state_dict=outside)
        load_tokenizer(base, backbone.spec).save_pretrained(folder)
        files = write_graphs(folder, layers, vocabulary)
        write_about(folder, Exported(backbone.spec.digest, precision, routed, files))

    write_whole(output, write)
