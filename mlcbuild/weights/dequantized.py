"""Converted weights as a checkpoint again: what the quantized model really computes with, under the names of the hub.

`open_dequantized` gives a WeightSource, so that a reference can run on it: a compiled model must agree with that
closely, however coarse its quantization is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlcbuild.quantization import get_layout, get_method
from mlcbuild.weights.mapping import Entry
from mlcbuild.weights.shards import Shards, open_shards
from mlcbuild.weights.source import make_weight_map

if TYPE_CHECKING:
    from mlcbuild.recipes.schema import Quantization

TILE = 16  # rows; every layout can be read from a multiple of it


def open_dequantized(
    folder: Path, family: str, config: Mapping[str, Any], quantization: Quantization, layout: str
) -> DequantizedSource:
    """The weights that convert_weights wrote into `folder`. Raises WeightError, RecipeError."""
    from mlcbuild.models import get_family

    weight_map = make_weight_map(get_family(family), config, folder)
    return DequantizedSource(open_shards(folder), weight_map.entries, quantization, layout)


class DequantizedSource:
    """Tensors of the original names and shapes, made of the stored codes and scales."""

    def __init__(self, shards: Shards, entries: tuple[Entry, ...], quantization: Quantization, layout: str) -> None:
        self.label = shards.label
        self.shards = shards
        self.quantization = quantization
        self.method = get_method(quantization.method)
        self.layout = get_layout(layout)
        self.places: dict[str, tuple[Entry, int]] = {}  # name -> entry, first row in it
        self.shapes: dict[str, tuple[int, ...]] = {}
        for entry in entries:
            first = 0
            for name, shape in entry.source_shapes.items():
                self.places[name], self.shapes[name] = (entry, first), shape
                first += shape[0]

    def names(self) -> list[str]:
        """Names of all tensors, as in the checkpoint."""
        return list(self.places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.shapes[name]

    def dtype(self, name: str) -> str:
        """F32."""
        return "F32"

    def read(self, name: str, start_row: int, stop_row: int) -> NDArray[np.float32]:
        """Rows as float32."""
        entry, first = self.places[name]
        start, stop = first + start_row, first + stop_row
        if entry.kind == "vector":
            return self.shards.read(entry.name, start, stop).astype(np.float32)
        rows, width = entry.shape
        begin, end = start // TILE * TILE, min(rows, -(-stop // TILE) * TILE)
        stored = {}
        for suffix in self.layout.storage(self.quantization, (rows, width)):
            items = self.shards.spec(f"{entry.name}.{suffix}").shape[0]
            per_item = -(-rows // items)
            stored[suffix] = self.shards.read(f"{entry.name}.{suffix}", begin // per_item, -(-end // per_item))
        tensors = self.layout.unpack(self.quantization, stored, (end - begin, width))
        return self.method.dequantize(self.quantization, tensors)[start - begin : stop - begin]
