"""group: 4-bit codes with one scale per group of weights along the input axis, in MLC's storage (q4f16_1, q4f32_1).

For a group of weights w: scale = max|w| / 7 in q.dtype, code = clamp(round(w / scale + 7), 0, 14), weight = (code - 7)
* scale. Eight codes make a uint32, the first in the lowest bits. A group whose scale is 0 (all zero, or too small for
q.dtype) stores the code 7, where MLC divides by zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlcbuild.errors import RecipeError, WeightError
from mlcbuild.quantization import TensorSpec

if TYPE_CHECKING:
    from mlcbuild.quantization import Tensors
    from mlcbuild.recipes.schema import Quantization

ZERO = 7  # the code of weight 0
CODES = 8  # codes in a uint32


def get_group_size(q: Quantization) -> int:
    """Weights per scale. Raises RecipeError for parameters that this method does not implement."""
    if q.bits != 4 or q.group_size is None or q.group_size % CODES:
        raise RecipeError(
            f"quantization '{q.name}': method group needs bits 4 and a group_size that is a multiple of 8, "
            f"not bits {q.bits} and group_size {q.group_size}",
            hint=f"mend recipes/quantizations/{q.name}.yaml, e.g. bits: 4, group_size: 32",
        )
    return q.group_size


def storage(q: Quantization, shape: tuple[int, int]) -> dict[str, TensorSpec]:
    """{"q_weight": (N, K/8) uint32, "q_scale": (N, K/group) in q.dtype}. K must be a multiple of the group."""
    group = get_group_size(q)
    rows, width = shape
    if width % group:
        raise WeightError(
            f"a matrix of {rows} x {width} cannot be cut into groups of {group} inputs",
            hint=f"use a quantization without groups (q0f16, q0f32), or a group_size that divides {width}",
        )
    return {
        "q_weight": TensorSpec((rows, width // CODES), "uint32"),
        "q_scale": TensorSpec((rows, width // group), q.dtype),
    }


def quantize(q: Quantization, weight: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """Codes and scales of a block of rows (rows, K) float32, finite. Fastest for blocks that fit in the L2 cache."""
    rows, width = weight.shape
    group = get_group_size(q)
    scale = (max_of_groups(weight, group) / np.float32(ZERO)).astype(q.dtype).reshape(rows, width // group)
    divisor = scale.astype(np.float32)
    divisor[divisor == 0] = 1
    codes = weight.reshape(rows, width // group, group) / divisor[:, :, None]
    # Truncation after + 7.5 rounds to the nearest; a scale near the smallest float16 may still be far from max|w|/7.
    codes += np.float32(ZERO + 0.5)
    np.clip(codes, 0, 2 * ZERO, out=codes)
    pairs = codes.astype(np.uint8).reshape(rows, width).view("<u2")
    packed = (pairs | (pairs >> 4)).astype(np.uint8)
    return {"q_weight": packed.view("<u4"), "q_scale": scale}


def max_of_groups(weight: NDArray[np.float32], group: int) -> NDArray[np.float32]:
    """max|w| of each group of adjacent weights, flat.

    The bits of non-negative floats order as integers do, and halving pairs is five times faster than a reduction over
    a short axis.
    """
    bits: NDArray[np.uint32] = np.abs(weight).reshape(-1).view(np.uint32)
    if group & (group - 1):
        bits = bits.reshape(-1, group).max(axis=1)
        group = 1
    while group > 1:
        bits = np.maximum(bits[0::2], bits[1::2])
        group //= 2
    return bits.view(np.float32)


def dequantize(q: Quantization, tensors: Tensors) -> NDArray[np.float32]:
    """The float32 rows (rows, K) that codes and scales stand for: the product is exact in float32."""
    codes = get_codes(tensors["q_weight"])
    rows, width = codes.shape
    scale = tensors["q_scale"].astype(np.float32)
    groups = codes.reshape(rows, scale.shape[1], -1).astype(np.float32) - ZERO
    groups *= scale[:, :, None]
    return groups.reshape(rows, width)


def get_codes(q_weight: NDArray[Any]) -> NDArray[np.uint8]:
    """Unpack uint32 (rows, K/8) to one code per byte (rows, K)."""
    pairs = np.ascontiguousarray(q_weight).view(np.uint8)
    return np.stack((pairs & 15, pairs >> 4), axis=-1).reshape(len(q_weight), -1)


def dequantize_te(q: Quantization, shape: tuple[Any, int], tensors: Mapping[str, Any]) -> Any:
    """te.Tensor (N, K) in q.dtype: (code - 7) * scale."""
    from tvm import te, tirx

    group = get_group_size(q)
    q_weight, q_scale = tensors["q_weight"], tensors["q_scale"]

    def compute(n: Any, k: Any) -> Any:
        shift = ((k % CODES) * q.bits).astype("uint32")
        code = tirx.bitwise_and(tirx.shift_right(q_weight[n, k // CODES], shift), tirx.const(15, "uint32"))
        return (code.astype(q.dtype) - tirx.const(ZERO, q.dtype)) * q_scale[n, k // group]

    return te.compute(shape, compute, name="dequantize")
