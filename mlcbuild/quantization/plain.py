"""plain: weights stored as they are, in float16 or float32 (q0f16, q0f32)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlcbuild.quantization import TensorSpec

if TYPE_CHECKING:
    from mlcbuild.quantization import Tensors
    from mlcbuild.recipes.schema import Quantization


def storage(q: Quantization, shape: tuple[int, int]) -> dict[str, TensorSpec]:
    """{"weight": (N, K) in q.dtype}."""
    return {"weight": TensorSpec(shape, q.dtype)}


def quantize(q: Quantization, weight: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """A block of rows (rows, K), rounded to q.dtype."""
    return {"weight": weight.astype(q.dtype, copy=False)}


def dequantize(q: Quantization, tensors: Tensors) -> NDArray[np.float32]:
    """The rows as float32."""
    return tensors["weight"].astype(np.float32)


def dequantize_te(q: Quantization, shape: tuple[Any, int], tensors: Mapping[str, Any]) -> Any:
    """The stored te.Tensor itself: it is (N, K) in q.dtype already."""
    return tensors["weight"]
