"""int8-16x64: blocks of 16 rows x 64 inputs, a stream for processors that multiply bytes by fours or by pairs.

AVX-512 VNNI (`vpdpbusd`), AVX-VNNI, plain AVX2 and AVX-512 (`vpmaddubsw`) and ARM's dot products (`sdot`) all read it,
so that packages for different processors share their weights.

A block starts with 64 B of scales [2 groups][16 rows] float16. With 4 bits codes follow as [2 groups][4 vectors][64 B],
576 bytes in all: byte r*4+b of vector v holds the code of row r at input v*4+b of its group of 32 in the low half, at
16+v*4+b in the high half, so that the kernel splits it by two masks, without a shift. With 8 bits they follow as
[2 groups][8 vectors][64 B], 1,088 bytes in all: byte r*4+b of vector v is the code of row r at input v*4+b. Codes and
their zero point (7, 127) are MLC's. Missing rows and inputs have the code of zero, and scale 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlcbuild.quantization import TensorSpec
from mlcbuild.quantization.group import WIDTHS, get_zero_word
from mlcbuild.quantization.layouts.rows16 import ROWS, pad_rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mlcbuild.quantization import Tensors
    from mlcbuild.recipes.schema import Quantization

GROUP = 32
SCALE_BYTES = 64
LOW, HIGH = 0x0F0F0F0F0F0F0F0F, 0xF0F0F0F0F0F0F0F0


def get_block_bytes(bits: int) -> int:
    """Bytes of a block: its scales and 16 x 64 codes."""
    return SCALE_BYTES + ROWS * 2 * GROUP * bits // 8


def accepts(q: Quantization) -> bool:
    """Groups of 32 codes with float16 scales, where inputs may be rounded to int8."""
    fits = (q.method, q.group_size, q.dtype, q.activations) == ("group", GROUP, "float16", "int8")
    return fits and q.bits in WIDTHS


def vector_dtype(q: Quantization) -> str:
    """CPU kernels compute in float32, and vectors are small."""
    return "float32"


def storage(q: Quantization, shape: tuple[int, int]) -> dict[str, TensorSpec]:
    """{"q_tiles": (ceil(N/16), ceil(K/64), 576 or 1,088) uint8}."""
    size = get_block_bytes(q.bits)
    return {"q_tiles": TensorSpec((-(-shape[0] // ROWS), -(-shape[1] // (2 * GROUP)), size), "uint8")}


def pack(q: Quantization, tensors: Tensors) -> dict[str, NDArray[Any]]:
    """q_weight (rows, K bits/32) and q_scale (rows, K/32) of a block of rows -> q_tiles."""
    import numpy as np

    zero = get_zero_word(q.bits)
    words, scale = pad_rows(tensors["q_weight"], zero), pad_rows(tensors["q_scale"], 0)
    if scale.shape[1] % 2:
        words = np.pad(words, ((0, 0), (0, GROUP * q.bits // 32)), constant_values=zero)
        scale = np.pad(scale, ((0, 0), (0, 1)))
    if q.bits == 4:
        words = pair_halves(words)
    tiles, blocks = len(scale) // ROWS, scale.shape[1] // 2
    out = np.empty((tiles, blocks, get_block_bytes(q.bits)), np.uint8)
    codes = out[:, :, SCALE_BYTES:].view(np.uint32).reshape(tiles, blocks, -1, ROWS)
    codes[...] = words.reshape(tiles, ROWS, blocks, -1).transpose(0, 2, 3, 1)
    scales = out[:, :, :SCALE_BYTES].view(np.float16).reshape(tiles, blocks, 2, ROWS)
    scales[...] = scale.reshape(tiles, ROWS, blocks, 2).transpose(0, 2, 3, 1)
    return {"q_tiles": out}


def unpack(q: Quantization, tensors: Tensors, shape: tuple[int, int]) -> dict[str, NDArray[Any]]:
    """q_tiles -> q_weight (rows, K bits/32) and q_scale (rows, K/32) of a block of shape (rows, K)."""
    import numpy as np

    packed = tensors["q_tiles"]
    tiles, blocks = packed.shape[:2]
    rows, width = shape
    codes = packed[:, :, SCALE_BYTES:].view(np.uint32).reshape(tiles, blocks, -1, ROWS).transpose(0, 3, 1, 2)
    words: NDArray[np.uint32] = np.ascontiguousarray(codes).reshape(tiles * ROWS, -1)
    if q.bits == 4:
        words = part_halves(words)
    scales = packed[:, :, :SCALE_BYTES].view(np.float16).reshape(tiles, blocks, 2, ROWS).transpose(0, 3, 1, 2)
    return {
        "q_weight": np.ascontiguousarray(words[:rows, : width * q.bits // 32]),
        "q_scale": np.ascontiguousarray(scales.reshape(tiles * ROWS, -1)[:rows, : width // GROUP]),
    }


def pair_halves(words: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """4-bit codes of whole groups (rows, K/8), in order -> as the kernel reads them: input i and 16 + i in a byte."""
    import numpy as np

    halves = np.ascontiguousarray(words).view(np.uint64).reshape(-1, 2)
    low, high = halves[:, 0], halves[:, 1]
    # Byte j of `low` holds codes 2j and 2j+1 of the group, of `high` 16+2j and 16+2j+1.
    mixed = np.empty((len(low), 8, 2), np.uint8)
    mixed[:, :, 0] = as_bytes((low & LOW) | ((high & LOW) << 4))
    mixed[:, :, 1] = as_bytes(((low >> 4) & LOW) | (high & HIGH))
    return mixed.reshape(-1).view(np.uint32).reshape(words.shape)


def part_halves(words: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The inverse of pair_halves."""
    import numpy as np

    mixed = words.view(np.uint8).reshape(-1, 8, 2)
    even, odd = as_halves(mixed[:, :, 0]), as_halves(mixed[:, :, 1])
    halves = np.stack(((even & LOW) | ((odd & LOW) << 4), ((even >> 4) & LOW) | (odd & HIGH)), axis=1)
    return halves.view(np.uint32).reshape(words.shape)


def as_bytes(words: NDArray[Any]) -> NDArray[np.uint8]:
    """(n,) uint64 -> (n, 8) bytes, lowest first."""
    return words.view("u1").reshape(-1, 8)


def as_halves(columns: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """(n, 8) bytes -> (n,) uint64, lowest first."""
    import numpy as np

    return np.ascontiguousarray(columns).view(np.uint64).reshape(-1)
