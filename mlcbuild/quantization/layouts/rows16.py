"""rows16: tiles of 16 output rows with the row in the innermost axis, for portable CPU kernels (lane = row).

Each canonical tensor (N, C) becomes (ceil(N/16), C, 16) of the same dtype. Rows that fill up the last tile are zero:
the code of zero and scale 0, or plain zero.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlcbuild.quantization import TensorSpec, get_method
from mlcbuild.quantization.group import get_zero_word

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mlcbuild.quantization import Tensors
    from mlcbuild.recipes.schema import Quantization

ROWS = 16
READERS = Path(__file__).parents[2] / "compiler" / "kernels"


def accepts(q: Quantization) -> bool:
    """Methods for which a CPU kernel reads these tiles: kernels/rows16_<method>.py."""
    return (READERS / f"rows16_{q.method}.py").is_file()


def vector_dtype(q: Quantization) -> str:
    """CPU kernels compute in float32, and vectors are small."""
    return "float32"


def storage(q: Quantization, shape: tuple[int, int]) -> dict[str, TensorSpec]:
    """Canonical (N, C) -> (ceil(N/16), C, 16), for each suffix."""
    return {
        suffix: TensorSpec((-(-spec.shape[0] // ROWS), spec.shape[1], ROWS), spec.dtype)
        for suffix, spec in get_method(q.method).storage(q, shape).items()
    }


def pack(q: Quantization, tensors: Tensors) -> dict[str, NDArray[Any]]:
    """Canonical tensors of a block of rows -> tiles."""
    return {suffix: pack_rows(array, get_padding(q, suffix)) for suffix, array in tensors.items()}


def unpack(q: Quantization, tensors: Tensors, shape: tuple[int, int]) -> dict[str, NDArray[Any]]:
    """Tiles -> canonical tensors of a block of shape (rows, K)."""
    import numpy as np

    return {
        suffix: np.ascontiguousarray(tiles.transpose(0, 2, 1)).reshape(-1, tiles.shape[1])[: shape[0]]
        for suffix, tiles in tensors.items()
    }


def get_padding(q: Quantization, suffix: str) -> int:
    """The value that means zero in a canonical tensor."""
    return get_zero_word(q.bits) if suffix == "q_weight" else 0


def pack_rows(array: NDArray[Any], padding: int) -> NDArray[Any]:
    """(rows, C) -> (ceil(rows/16), C, 16)."""
    import numpy as np

    tiles = pad_rows(array, padding).reshape(-1, ROWS, array.shape[1])
    return np.ascontiguousarray(tiles.transpose(0, 2, 1))


def pad_rows(array: NDArray[Any], padding: int) -> NDArray[Any]:
    """Fill up to whole tiles of 16 rows."""
    import numpy as np

    return np.pad(array, ((0, -len(array) % ROWS), (0, 0)), constant_values=padding) if len(array) % ROWS else array
