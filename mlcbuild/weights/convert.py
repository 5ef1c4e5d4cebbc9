"""Convert a checkpoint: read blocks of rows, quantize, lay out, write; any model in a fixed amount of memory.

A block is about half a million weights, which stay in the processor's L2 cache from step to step. Blocks are spread
over threads (numpy works without the interpreter's lock); at most a few are in memory at a time.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mlcbuild.errors import WeightError
from mlcbuild.quantization import Layout, Method, TensorSpec, get_layout, get_method
from mlcbuild.weights.mapping import Entry, WeightMap, check_mapping
from mlcbuild.weights.shards import ShardWriter
from mlcbuild.weights.source import WeightSource, load_json, make_weight_map, open_source

if TYPE_CHECKING:
    from mlcbuild.recipes.schema import Quantization

BLOCK = 1 << 19  # weights in a block
TILE = 16  # rows; blocks are whole tiles of every layout
MOST_THREADS = 8
LARGE = 31 << 20  # bytes; below glibc's largest dynamic threshold of 32 MiB


class Report(Protocol):
    """Tells the user how far a step is; `fraction` is 0..1, `size` the bytes of which it is one."""

    def __call__(self, text: str, fraction: float | None = None, size: int | None = None) -> None: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a block needs to know."""

    source: WeightSource
    quantization: Quantization
    method: Method
    layout: Layout
    writer: ShardWriter


@dataclass(frozen=True, slots=True)
class Block:
    """Rows [start, stop) of an entry."""

    entry: Entry
    start: int
    stop: int


def convert_weights(
    source: Path, destination: Path, family: str, quantization: Quantization, layout: str, report: Report
) -> None:
    """Write params_shard_*.bin and tensor-cache.json for the checkpoint in `source` into `destination`.

    Raises RecipeError for an unknown family, WeightError for a checkpoint that is damaged, incomplete or of another
    family, for weights that are not finite or too large for the quantization, and for a full disk.
    """
    weight_map = load_weight_map(source, family)
    checkpoint = open_source(source)
    check_mapping(weight_map, checkpoint)
    specs = make_specs(weight_map, quantization, layout)
    weights = sum(math.prod(entry.shape) for entry in weight_map.entries)
    destination.mkdir(parents=True, exist_ok=True)
    with ShardWriter(destination, specs, weights) as writer:
        plan = Plan(checkpoint, quantization, get_method(quantization.method), get_layout(layout), writer)
        size = sum(spec.nbytes for spec in specs.values())
        run_blocks(plan, list(make_blocks(weight_map)), weights, size, report)


def load_weight_map(source: Path, family: str) -> WeightMap:
    """The family's weight map for the checkpoint's own config.json. Raises WeightError if it is of another family."""
    from mlcbuild.models import get_family

    module = get_family(family)
    config = load_json(source / "config.json")
    if config.get("model_type") != family:
        raise WeightError(
            f"{source / 'config.json'} is of model_type '{config.get('model_type')}', the recipe of family '{family}'",
            hint="set `family` and `config` in the model recipe to those of the checkpoint",
        )
    return make_weight_map(module, config, source / "config.json")


def make_specs(weight_map: WeightMap, quantization: Quantization, layout: str) -> dict[str, TensorSpec]:
    """Name, shape and dtype of every stored tensor, in the order of the weight map."""
    chosen = get_layout(layout)
    specs: dict[str, TensorSpec] = {}
    for entry in weight_map.entries:
        if entry.kind == "vector":
            specs[entry.name] = TensorSpec(entry.shape, chosen.vector_dtype(quantization))
        else:
            rows, width = entry.shape
            for suffix, spec in chosen.storage(quantization, (rows, width)).items():
                specs[f"{entry.name}.{suffix}"] = spec
    return specs


def make_blocks(weight_map: WeightMap) -> Iterator[Block]:
    """Cut every entry into blocks of whole tiles of rows; vectors stay whole."""
    for entry in weight_map.entries:
        rows = entry.shape[0]
        step = rows if entry.kind == "vector" else max(TILE, BLOCK // entry.shape[1] // TILE * TILE)
        for start in range(0, rows, step):
            yield Block(entry, start, min(start + step, rows))


def run_blocks(plan: Plan, blocks: list[Block], weights: int, size: int, report: Report) -> None:
    """Convert all blocks on a few threads into `size` bytes and report each whole percent."""
    keep_freed_memory()
    done, told = 0, -1
    for block in run_ahead(plan, blocks, min(MOST_THREADS, os.cpu_count() or 1)):
        done += (block.stop - block.start) * math.prod(block.entry.shape[1:])
        if done * 100 // weights > told:
            told = done * 100 // weights
            report(block.entry.name, done / weights, size)


def keep_freed_memory() -> None:
    """Make glibc keep the memory of freed blocks; harmless with other allocators.

    It would return the arrays of each block to the system and fetch them again page by page, which takes as long as
    the work itself. Freeing one array above its threshold raises the threshold for good.
    """
    np.empty(LARGE, np.uint8)


def run_ahead(plan: Plan, blocks: list[Block], threads: int) -> Iterator[Block]:
    """Yield blocks, in order, as they are done; no more than two a thread are under way. Raises their errors."""
    waiting: deque[tuple[Block, Future[None]]] = deque()

    def finish_oldest() -> Block:
        block, future = waiting.popleft()
        future.result()
        return block

    with ThreadPoolExecutor(threads) as pool:
        try:
            for block in blocks:
                if len(waiting) == 2 * threads:
                    yield finish_oldest()
                waiting.append((block, pool.submit(run_block, plan, block)))
            while waiting:
                yield finish_oldest()
        finally:
            for _, future in waiting:
                future.cancel()


def run_block(plan: Plan, block: Block) -> None:
    """Read, check, quantize, lay out and write one block."""
    entry, q = block.entry, plan.quantization
    values = read_rows(plan.source, entry, block.start, block.stop)
    if entry.kind == "vector":
        dtype = plan.layout.vector_dtype(q)
        check_values(entry.name, values, dtype)
        plan.writer.write(entry.name, 0, values.astype(dtype, copy=False))
        return
    check_values(entry.name, values, q.dtype)
    packed = plan.layout.pack(q, plan.method.quantize(q, values))
    for suffix, array in packed.items():
        name = f"{entry.name}.{suffix}"
        spec = plan.writer.slots[name].spec
        # Axis 0 of a stored tensor counts rows, or tiles of rows.
        rows_per_item = -(-entry.shape[0] // spec.shape[0])
        item_bytes = spec.nbytes // spec.shape[0]
        plan.writer.write(name, block.start // rows_per_item * item_bytes, array)


def read_rows(source: WeightSource, entry: Entry, start: int, stop: int) -> NDArray[np.float32]:
    """Rows [start, stop) of the entry's sources, one below the other, as float32."""
    parts: list[NDArray[np.float32]] = []
    first = 0
    for name, shape in entry.source_shapes.items():
        last = first + shape[0]
        if first < stop and start < last:
            parts.append(source.read(name, max(start, first) - first, min(stop, last) - first))
        first = last
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def check_values(name: str, values: NDArray[Any], dtype: str) -> None:
    """Raise WeightError for NaN, infinity, and numbers beyond the dtype."""
    largest = max(float(values.max()), -float(values.min()))
    if not largest <= float(ml_dtypes.finfo(np.dtype(dtype)).max):
        finite = math.isfinite(largest) and not np.isnan(values).any()
        what = f"a weight of size {largest:g}, which {dtype} cannot hold" if finite else "NaN or infinity"
        raise WeightError(
            f"{name} has {what}",
            hint="use a quantization of dtype float32 (q0f32, q4f32_1)" if finite else "the checkpoint is damaged",
        )
