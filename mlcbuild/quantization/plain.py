"""plain: weights stored as they are, in float16, bfloat16 or float32 (q0f16, q0bf16, q0f32)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mlcbuild.quantization import TensorSpec

if TYPE_CHECKING:
    from mlcbuild.quantization import Tensors
    from mlcbuild.recipes.schema import Quantization


def get_stored_dtype(q: Quantization) -> str:
    """q.dtype, but uint16 for the bits of bfloat16, which neither numpy nor TVM's code for CPUs has a type for."""
    return "uint16" if q.dtype == "bfloat16" else q.dtype


def storage(q: Quantization, shape: tuple[int, int]) -> dict[str, TensorSpec]:
    """{"weight": (N, K) as get_stored_dtype says}."""
    return {"weight": TensorSpec(shape, get_stored_dtype(q))}


def quantize(q: Quantization, weight: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """A block of rows (rows, K), rounded to q.dtype."""
    if q.dtype == "bfloat16":
        return {"weight": weight.astype(ml_dtypes.bfloat16).view(np.uint16)}
    return {"weight": weight.astype(q.dtype, copy=False)}


def dequantize(q: Quantization, tensors: Tensors) -> NDArray[np.float32]:
    """The rows as float32."""
    stored = tensors["weight"]
    if q.dtype == "bfloat16":
        stored = stored.view(ml_dtypes.bfloat16)
    return stored.astype(np.float32)


def dequantize_te(q: Quantization, shape: tuple[Any, int], tensors: Mapping[str, Any]) -> Any:
    """The stored te.Tensor itself: it is (N, K) in q.dtype already. Not for bfloat16, see layouts/canonical.py."""
    return tensors["weight"]
