"""canonical: the storage tensors of the method, unchanged, in MLC's order (GPU targets)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlcbuild.quantization import TensorSpec, get_method

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mlcbuild.quantization import Tensors
    from mlcbuild.recipes.schema import Quantization


def accepts(q: Quantization) -> bool:
    """Every quantization but those in bfloat16, which the lowering to GPUs has not been tried with."""
    return q.dtype != "bfloat16"


def vector_dtype(q: Quantization) -> str:
    """Norms and biases are stored as the plain weights are."""
    return q.dtype


def storage(q: Quantization, shape: tuple[int, int]) -> dict[str, TensorSpec]:
    """The method's own tensors; axis 0 counts rows."""
    return get_method(q.method).storage(q, shape)


def pack(q: Quantization, tensors: Tensors) -> dict[str, NDArray[Any]]:
    """The tensors themselves."""
    return dict(tensors)


def unpack(q: Quantization, tensors: Tensors, shape: tuple[int, int]) -> dict[str, NDArray[Any]]:
    """The tensors themselves."""
    return dict(tensors)
