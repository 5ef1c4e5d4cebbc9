"""The boundary between deciding and computing: whatever implements this can drive the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from engine.core import Batch, Draw, Limits

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Executor(Protocol):
    """Holds the weights and the KV pages. Made, used and closed by one thread (TVM's thread pool belongs to it)."""

    @property
    def limits(self) -> Limits:
        """What this executor can hold and take; never changes."""

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Write the batch's keys and values into their pages; next-token logits [len(logit_rows), vocab_size].

        The array is the caller's to keep. An exception means that the executor cannot be used any more.
        """

    def run_hidden(self, batch: Batch) -> NDArray[np.float32]:
        """As `run`, but the last hidden states of all its tokens: [tokens, hidden_size]. Not where that size is 0."""

    def pick_tokens(self, draws: Mapping[int, Draw]) -> list[int]:
        """A token for each row of the logits that the latest `run` returned, -1 where they are unusable.

        Which, depends on the row and its draw alone. Only where `limits.picks_tokens`.
        """

    def copy_page(self, source: int, destination: int) -> None:
        """Make page `destination` equal to page `source`, in every layer."""

    def read_pages(self, pages: Sequence[int]) -> NDArray[Any]:
        """A copy of what pages hold; they lie along axis 1, and the array means nothing to anybody else."""

    def write_pages(self, pages: Sequence[int], held: NDArray[Any]) -> None:
        """Make pages hold what `read_pages` gave."""

    def close(self) -> None:
        """Release everything."""
