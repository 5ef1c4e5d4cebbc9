"""int8-16x64: blocks of 16 rows x 64 inputs, a stream for processors that multiply bytes by fours or by pairs.

AVX-512 VNNI (`vpdpbusd`), AVX-VNNI, plain AVX2 and AVX-512 (`vpmaddubsw`) and ARM's dot products (`sdot`) all read it,
so that packages for different processors share their weights.

A block is 576 bytes: 64 B of scales [2 groups][16 rows] float16, then codes [2 groups][4 vectors][64 B]. Byte r*4+b of
vector v holds the code of row r at input v*4+b of its group of 32 in the low half, at 16+v*4+b in the high half: the
kernel splits it by two masks, without a shift. The zero point is MLC's 7. Missing rows and inputs have code 7, scale 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlcbuild.quantization import TensorSpec
from mlcbuild.quantization.layouts.rows16 import ROWS, ZERO_WORD, pad_rows

if TYPE_CHECKING:
    from mlcbuild.quantization import Tensors
    from mlcbuild.recipes.schema import Quantization

GROUP = 32
BLOCK_BYTES = 576
SCALE_BYTES = 64
LOW = np.uint64(0x0F0F0F0F0F0F0F0F)
HIGH = np.uint64(0xF0F0F0F0F0F0F0F0)
FOUR = np.uint64(4)


def accepts(q: Quantization) -> bool:
    """4-bit groups of 32 with float16 scales, where inputs may be rounded to int8."""
    return (q.method, q.bits, q.group_size, q.dtype, q.activations) == ("group", 4, GROUP, "float16", "int8")


def vector_dtype(q: Quantization) -> str:
    """CPU kernels compute in float32, and vectors are small."""
    return "float32"


def storage(q: Quantization, shape: tuple[int, int]) -> dict[str, TensorSpec]:
    """{"q_tiles": (ceil(N/16), ceil(K/64), 576) uint8}."""
    return {"q_tiles": TensorSpec((-(-shape[0] // ROWS), -(-shape[1] // (2 * GROUP)), BLOCK_BYTES), "uint8")}


def pack(q: Quantization, tensors: Tensors) -> dict[str, NDArray[Any]]:
    """q_weight (rows, K/8) and q_scale (rows, K/32) of a block of rows -> q_tiles."""
    words, scale = pad_rows(tensors["q_weight"], ZERO_WORD), pad_rows(tensors["q_scale"], 0)
    if scale.shape[1] % 2:
        words = np.pad(words, ((0, 0), (0, GROUP // 8)), constant_values=ZERO_WORD)
        scale = np.pad(scale, ((0, 0), (0, 1)))
    tiles, blocks = len(scale) // ROWS, scale.shape[1] // 2
    halves = np.ascontiguousarray(words).view(np.uint64).reshape(-1, 2)
    low, high = halves[:, 0], halves[:, 1]
    # Byte j of `low` holds codes 2j and 2j+1 of the group, of `high` 16+2j and 16+2j+1.
    mixed = np.empty((len(low), 8, 2), np.uint8)
    mixed[:, :, 0] = as_bytes((low & LOW) | ((high & LOW) << FOUR))
    mixed[:, :, 1] = as_bytes(((low >> FOUR) & LOW) | (high & HIGH))
    out = np.empty((tiles, blocks, BLOCK_BYTES), np.uint8)
    codes = out[:, :, SCALE_BYTES:].view(np.uint32).reshape(tiles, blocks, 8, ROWS)
    codes[...] = mixed.reshape(-1).view(np.uint32).reshape(tiles, ROWS, blocks, 8).transpose(0, 2, 3, 1)
    scales = out[:, :, :SCALE_BYTES].view(np.float16).reshape(tiles, blocks, 2, ROWS)
    scales[...] = scale.reshape(tiles, ROWS, blocks, 2).transpose(0, 2, 3, 1)
    return {"q_tiles": out}


def unpack(q: Quantization, tensors: Tensors, shape: tuple[int, int]) -> dict[str, NDArray[Any]]:
    """q_tiles -> q_weight (rows, K/8) and q_scale (rows, K/32) of a block of shape (rows, K)."""
    packed = tensors["q_tiles"]
    tiles, blocks = packed.shape[:2]
    rows, width = shape
    codes = packed[:, :, SCALE_BYTES:].view(np.uint32).reshape(tiles, blocks, 8, ROWS).transpose(0, 3, 1, 2)
    mixed = np.ascontiguousarray(codes).view(np.uint8).reshape(-1, 8, 2)
    even, odd = as_halves(mixed[:, :, 0]), as_halves(mixed[:, :, 1])
    halves = np.stack(((even & LOW) | ((odd & LOW) << FOUR), ((even >> FOUR) & LOW) | (odd & HIGH)), axis=1)
    words = halves.view(np.uint32).reshape(tiles * ROWS, -1)
    scales = packed[:, :, :SCALE_BYTES].view(np.float16).reshape(tiles, blocks, 2, ROWS).transpose(0, 3, 1, 2)
    return {
        "q_weight": np.ascontiguousarray(words[:rows, : width // 8]),
        "q_scale": np.ascontiguousarray(scales.reshape(tiles * ROWS, -1)[:rows, : width // GROUP]),
    }


def as_bytes(words: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """(n,) uint64 -> (n, 8) bytes, lowest first."""
    return words.view(np.uint8).reshape(-1, 8)


def as_halves(columns: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """(n, 8) bytes -> (n,) uint64, lowest first."""
    return np.ascontiguousarray(columns).view(np.uint64).reshape(-1)
