"""Quantization methods and weight layouts, found by file name.

A method (`plain.py`, `group.py`) turns a float matrix (N outputs, K inputs) into storage tensors, one per suffix, and
back. A layout (`layouts/*.py`) rearranges these tensors for a target without losing a bit. This module imports no
numpy, so that recipes can be checked against the file names.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from mlcbuild.errors import RecipeError
from mlcbuild.recipes.names import check_name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mlcbuild.recipes.schema import Quantization, Target

    Tensors = Mapping[str, NDArray[Any]]

ITEM_BYTES = {"float32": 4, "float16": 2, "uint32": 4, "uint16": 2, "uint8": 1}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, without alignment."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class Method(Protocol):
    """What each file in mlcbuild/quantization/ provides. Shapes are (N, K): outputs, inputs."""

    def storage(self, q: Quantization, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Canonical (MLC's) storage tensors of a matrix, by suffix. Raises WeightError if K does not fit."""

    def quantize(self, q: Quantization, weight: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """Storage tensors of a block of whole rows (float32)."""

    def dequantize(self, q: Quantization, tensors: Tensors) -> NDArray[np.float32]:
        """The float32 rows that the storage tensors stand for."""

    def dequantize_te(self, q: Quantization, shape: tuple[Any, int], tensors: Mapping[str, Any]) -> Any:
        """The same as a TVM te.Tensor (N, K) in q.dtype, from te tensors by suffix."""


class Layout(Protocol):
    """What each file in mlcbuild/quantization/layouts/ provides."""

    def accepts(self, q: Quantization) -> bool:
        """Whether this layout can hold weights of the quantization."""

    def vector_dtype(self, q: Quantization) -> str:
        """Dtype in which norms and biases are stored."""

    def storage(self, q: Quantization, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Stored tensors of a matrix (N, K), by suffix; axis 0 counts rows or tiles of rows."""

    def pack(self, q: Quantization, tensors: Tensors) -> dict[str, NDArray[Any]]:
        """Canonical tensors of a block of rows -> stored tensors. Only the last block may have N % 16 != 0."""

    def unpack(self, q: Quantization, tensors: Tensors, shape: tuple[int, int]) -> dict[str, NDArray[Any]]:
        """The lossless inverse of pack: canonical tensors of a block of shape (rows, K)."""


def list_methods() -> list[str]:
    """Names of the quantization methods: the files beside this one."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))


def list_layouts() -> list[str]:
    """Names of the weight layouts: the files in layouts/, with - for _."""
    return sorted(path.stem.replace("_", "-") for path in (Path(__file__).parent / "layouts").glob("[a-z]*.py"))


def get_method(name: str) -> Method:
    """The method module of that name. Raises UnknownNameError."""
    check_name("quantization method", name, list_methods())
    return cast(Method, importlib.import_module(f"{__name__}.{name}"))


@functools.cache
def get_layout(name: str) -> Layout:
    """The layout module of that name. Raises UnknownNameError."""
    check_name("weight layout", name, list_layouts())
    return cast(Layout, importlib.import_module(f"{__name__}.layouts.{name.replace('-', '_')}"))


def choose_layout(target: Target, q: Quantization) -> str:
    """The first layout of the target that accepts the quantization. Raises RecipeError if none does."""
    for name in target.layouts:
        if get_layout(name).accepts(q):
            return name
    raise RecipeError(
        f"target '{target.name}' has no weight layout for quantization '{q.name}' (tried {', '.join(target.layouts)})",
        hint="choose another quantization, or add a layout to the target recipe",
    )


__all__ = [
    "Layout",
    "Method",
    "TensorSpec",
    "choose_layout",
    "get_layout",
    "get_method",
    "list_layouts",
    "list_methods",
]
