"""group: codes of 4 or 8 bits with one scale per group of weights along the input axis, in MLC's storage.

For a group of weights w, with zero = 7 for 4 bits and 127 for 8: scale = max|w| / zero in q.dtype, code =
clamp(round(w / scale + zero), 0, 2 zero), weight = (code - zero) * scale. Eight codes of 4 bits or four of 8 make a
uint32, the first in the lowest bits. A group whose scale is 0 (all zero, or too small for q.dtype) stores the code
zero, where MLC divides by zero. MLC itself has no 8 bits; its names and storage say how they would be (q8f16_1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlcbuild.errors import RecipeError, WeightError
from mlcbuild.quantization import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mlcbuild.quantization import Tensors
    from mlcbuild.recipes.schema import Quantization

WIDTHS = (4, 8)  # bits of a code


def get_zero(bits: int) -> int:
    """The code of weight 0."""
    return (1 << (bits - 1)) - 1


def get_zero_word(bits: int) -> int:
    """A uint32 of codes of weight 0."""
    return get_zero(bits) * (0xFFFFFFFF // ((1 << bits) - 1))


def get_group_size(q: Quantization) -> int:
    """Weights per scale. Raises RecipeError for parameters that this method does not implement."""
    if q.bits not in WIDTHS or q.group_size is None or q.group_size % 8:
        raise RecipeError(
            f"quantization '{q.name}': method group needs bits 4 or 8 and a group_size that is a multiple of 8, "
            f"not bits {q.bits} and group_size {q.group_size}",
            hint=f"mend recipes/quantizations/{q.name}.yaml, e.g. bits: 4, group_size: 32",
        )
    if q.dtype == "bfloat16":
        raise RecipeError(
            f"quantization '{q.name}': method group keeps its scales in float16 or float32, not in bfloat16",
            hint=f"mend recipes/quantizations/{q.name}.yaml: dtype: float16 (activations may be bfloat16)",
        )
    return q.group_size


def storage(q: Quantization, shape: tuple[int, int]) -> dict[str, TensorSpec]:
    """{"q_weight": (N, K bits/32) uint32, "q_scale": (N, K/group) in q.dtype}. K must be a multiple of the group."""
    group = get_group_size(q)
    rows, width = shape
    if width % group:
        raise WeightError(
            f"a matrix of {rows} x {width} cannot be cut into groups of {group} inputs",
            hint=f"use a quantization without groups (q0f16, q0f32), or a group_size that divides {width}",
        )
    return {
        "q_weight": TensorSpec((rows, width * q.bits // 32), "uint32"),
        "q_scale": TensorSpec((rows, width // group), q.dtype),
    }


def quantize(q: Quantization, weight: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """Codes and scales of a block of rows (rows, K) float32, finite. Fastest for blocks that fit in the L2 cache."""
    import numpy as np

    rows, width = weight.shape
    group, zero = get_group_size(q), get_zero(q.bits)
    scale = (max_of_groups(weight, group) / np.float32(zero)).astype(q.dtype).reshape(rows, width // group)
    divisor = scale.astype(np.float32)
    divisor[divisor == 0] = 1
    codes = weight.reshape(rows, width // group, group) / divisor[:, :, None]
    # Truncation after + 0.5 rounds to the nearest; a scale near the smallest float16 may still be far from max|w|/zero.
    codes += np.float32(zero + 0.5)
    np.clip(codes, 0, 2 * zero, out=codes)
    packed = codes.astype(np.uint8).reshape(rows, width)
    if q.bits == 4:
        pairs = packed.view("<u2")
        packed = (pairs | (pairs >> 4)).astype(np.uint8)
    return {"q_weight": packed.view("<u4"), "q_scale": scale}


def max_of_groups(weight: NDArray[np.float32], group: int) -> NDArray[np.float32]:
    """max|w| of each group of adjacent weights, flat.

    The bits of non-negative floats order as integers do, and halving pairs is five times faster than a reduction over
    a short axis.
    """
    import numpy as np

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
    import numpy as np

    codes = get_codes(tensors["q_weight"], q.bits)
    rows, width = codes.shape
    scale = tensors["q_scale"].astype(np.float32)
    groups = codes.reshape(rows, scale.shape[1], -1).astype(np.float32) - get_zero(q.bits)
    groups *= scale[:, :, None]
    return groups.reshape(rows, width)


def get_codes(q_weight: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Unpack uint32 (rows, K bits/32) to one code per byte (rows, K)."""
    import numpy as np

    packed: NDArray[np.uint8] = np.ascontiguousarray(q_weight).view(np.uint8)
    return packed if bits == 8 else np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(q_weight), -1)


def dequantize_te(q: Quantization, shape: tuple[Any, int], tensors: Mapping[str, Any]) -> Any:
    """te.Tensor (N, K) in q.dtype: (code - zero) * scale."""
    from tvm import te, tirx

    group, codes = get_group_size(q), 32 // q.bits
    q_weight, q_scale = tensors["q_weight"], tensors["q_scale"]

    def compute(n: Any, k: Any) -> Any:
        shift = ((k % codes) * q.bits).astype("uint32")
        mask = tirx.const((1 << q.bits) - 1, "uint32")
        code = tirx.bitwise_and(tirx.shift_right(q_weight[n, k // codes], shift), mask)
        return (code.astype(q.dtype) - tirx.const(get_zero(q.bits), q.dtype)) * q_scale[n, k // group]

    return te.compute(shape, compute, name="dequantize")
