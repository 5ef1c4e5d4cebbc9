"""Unquantized references in plain numpy, one family per file; the file name is the family's name.

They share nothing with the compiler: no TVM, no weight map, their own reading of config.json. Each provides
`compute_logits(source, config, windows)` and must use every tensor of the checkpoint or fail, so that a checkpoint
with an unknown part never gets a wrong reference. A family whose maths is Llama's says so in three lines; see qwen2.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from mlcbuild.errors import QualityError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mlcbuild.weights.source import WeightSource


class Report(Protocol):
    """Tells the user how far a step is; `fraction` is 0..1."""

    def __call__(self, text: str, fraction: float | None = None) -> None: ...


class Reference(Protocol):
    """What each file in this folder provides."""

    def compute_logits(
        self,
        source: WeightSource,
        config: Mapping[str, Any],
        windows: Sequence[NDArray[np.int32]],
        report: Report,
    ) -> NDArray[np.float32]:
        """Logits [all tokens, vocabulary] of the windows, each a sequence of its own, one after the other.

        `config` holds the values of config.json. Raises QualityError for a configuration it does not implement.
        """


def list_references() -> list[str]:
    """Families with a reference, sorted."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))


def get_reference(family: str) -> Reference:
    """The reference of a family; raises QualityError, saying what to add, when there is none."""
    if family not in list_references():
        raise QualityError(
            f"no unquantized reference for family '{family}' (known: {', '.join(list_references())})",
            hint=f"add mlcbuild/quality/references/{family}.py: its own numpy forward pass, or, only if its maths is "
            "exactly Llama's, the three lines of qwen2.py",
        )
    return cast(Reference, importlib.import_module(f"{__name__}.{family}"))
