"""An executor without a model, for tests of everything above it: deterministic, numpy only, and strict.

It keeps tokens where a real one keeps keys and values, and reads each history back through the page table. So a wrong
page, position or row either breaks a rule, which is an error, or changes the text, which a test can see.

    FakeExecutor()                                                    a language of hashes: any text, always the same
    FakeExecutor(model=make_scripted_model(300, [(prompt, reply)], end_token=0))           says what it is told to say
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.core import Batch, Draw, Limits, SamplingParams
from engine.sampling.sampler import pick_at

Model = Callable[[NDArray[np.int32]], NDArray[np.float32]]
"""Next-token logits [vocab] after the tokens of one sequence [length]."""

UNWRITTEN = -1
DEFAULT_LIMITS = Limits(
    context_window=256, prefill_chunk=32, max_batch=4, page_size=16, num_pages=64, vocab_size=256, hidden_size=8
)


class FakeExecutor:
    """See engine.runtime.executor.Executor. Raises ValueError for a batch that breaks the rules of engine.core.Batch.

    `model` may raise or sleep to play a failing or slow machine. Sequences may share pages, but a page that is being
    written must be in one row only.
    """

    def __init__(self, limits: Limits = DEFAULT_LIMITS, model: Model | None = None) -> None:
        self.limits = limits
        self.batches = 0
        self.closed = False
        self._model = model or make_hash_model(limits.vocab_size)
        self._tokens = np.full((limits.num_pages, limits.page_size), UNWRITTEN, np.int32)
        self._positions = np.full((limits.num_pages, limits.page_size), UNWRITTEN, np.int32)
        self._logits = np.empty((0, limits.vocab_size), np.float32)

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Logits [len(logit_rows), vocab] of `model` after each wanted token."""
        self._write(batch)
        logits = np.empty((len(batch.logit_rows), self.limits.vocab_size), np.float32)
        for i, index in enumerate(batch.logit_rows):
            logits[i] = self._model(self._load_history(batch, int(batch.rows[index]), int(batch.positions[index])))
        self._logits = logits
        return logits

    def pick_tokens(self, draws: Mapping[int, Draw]) -> list[int]:
        """What the engine itself would pick."""
        _check(self.limits.picks_tokens, "there is no function for picking tokens")
        return [self._pick(self._logits[row], draw) for row, draw in draws.items()]

    def run_hidden(self, batch: Batch) -> NDArray[np.float32]:
        """Vectors [tokens, hidden_size] drawn from the history of each token."""
        _check(bool(self.limits.hidden_size), "there is no function for hidden states")
        self._write(batch)
        places = zip(batch.rows.tolist(), batch.positions.tolist(), strict=True)
        histories = [self._load_history(batch, row, position) for row, position in places]
        return np.stack([make_hidden_state(history, self.limits.hidden_size) for history in histories])

    def copy_page(self, source: int, destination: int) -> None:
        """Copy tokens and positions."""
        self._tokens[destination] = self._tokens[source]
        self._positions[destination] = self._positions[source]

    def read_pages(self, pages: Sequence[int]) -> NDArray[np.int32]:
        """Tokens and positions: [2, len(pages), page_size]."""
        held = np.stack([self._tokens[list(pages)], self._positions[list(pages)]])
        return np.asfortranarray(held)  # in memory as it likes, as a real one's

    def write_pages(self, pages: Sequence[int], held: NDArray[np.int32]) -> None:
        """The counterpart of read_pages."""
        self._tokens[list(pages)], self._positions[list(pages)] = held

    def close(self) -> None:
        """No batch is taken any more."""
        self.closed = True

    def _pick(self, logits: NDArray[np.float32], draw: Draw) -> int:
        params = SamplingParams(draw.temperature, draw.top_p, draw.top_k, min_p=draw.min_p)
        try:
            return pick_at(logits, params, draw.uniform)
        except ValueError:
            return -1

    def _write(self, batch: Batch) -> None:
        _check(not self.closed, "run after close")
        self._check_arrays(batch)
        self._check_sharing(batch)
        for token, position, row in zip(batch.tokens, batch.positions, batch.rows, strict=True):
            page, offset = self._get_slot(batch, int(row), int(position))
            self._tokens[page, offset], self._positions[page, offset] = token, position
        self.batches += 1

    def _check_arrays(self, batch: Batch) -> None:
        limits, count = self.limits, len(batch.tokens)
        arrays = (batch.tokens, batch.positions, batch.rows, batch.page_table, batch.logit_rows)
        _check(all(a.dtype == np.int32 for a in arrays), "not all arrays are int32")
        _check([a.ndim for a in arrays] == [1, 1, 1, 2, 1], "an array has the wrong number of axes")
        _check(1 <= count <= limits.prefill_chunk, f"{count} tokens, limit {limits.prefill_chunk}")
        _check(len(batch.positions) == count == len(batch.rows), "tokens, positions and rows differ in length")
        rows = len(batch.page_table)
        _check(1 <= rows <= limits.max_batch, f"{rows} sequences, limit {limits.max_batch}")
        _check(bool(np.array_equal(np.unique(batch.rows), np.arange(rows))), "a row of the page table has no token")
        _check(_is_within(batch.tokens, limits.vocab_size), "a token is not in the vocabulary")
        _check(_is_within(batch.positions, limits.context_window), "a position is outside of the context")
        _check(_is_within(batch.page_table, limits.num_pages), "there is no such page")
        _check(_is_within(batch.logit_rows, count), "logits are wanted of a token that is not there")
        _check(bool((np.diff(batch.logit_rows) > 0).all()), "logit_rows do not rise")
        steps, same = np.diff(batch.positions), np.diff(batch.rows) == 0
        _check(bool((np.diff(batch.rows) >= 0).all()), "the tokens of a sequence are not adjacent")
        _check(bool((steps[same] == 1).all()), "positions of a sequence are not contiguous")

    def _check_sharing(self, batch: Batch) -> None:
        """Every page that is written now is in one row."""
        used: list[set[int]] = []
        written: list[set[int]] = []
        for row in range(len(batch.page_table)):
            positions = batch.positions[batch.rows == row]
            first, last = int(positions[0]) // self.limits.page_size, int(positions[-1]) // self.limits.page_size
            _check(last < batch.page_table.shape[1], f"row {row} has no page for position {positions[-1]}")
            pages = batch.page_table[row, : last + 1].tolist()
            _check(len(set(pages)) == len(pages), f"row {row} has a page twice")
            used.append(set(pages))
            written.append(set(pages[first:]))
        for row, mine in enumerate(written):
            others = set[int]().union(*used[:row], *used[row + 1 :])
            _check(not mine & others, f"pages {sorted(mine & others)} of row {row} are in another row too")

    def _get_slot(self, batch: Batch, row: int, position: int) -> tuple[int, int]:
        index, offset = divmod(position, self.limits.page_size)
        return int(batch.page_table[row, index]), offset

    def _load_history(self, batch: Batch, row: int, last: int) -> NDArray[np.int32]:
        """The tokens of a sequence up to position `last`, as the pages have them."""
        pages = batch.page_table[row, : last // self.limits.page_size + 1]
        positions = self._positions[pages].ravel()[: last + 1]
        _check(bool(np.array_equal(positions, np.arange(last + 1))), f"row {row} has pages that it did not write")
        history: NDArray[np.int32] = self._tokens[pages].ravel()[: last + 1]
        return history


def make_hidden_state(history: NDArray[np.int32], size: int) -> NDArray[np.float32]:
    """What FakeExecutor says of a token: float32 [size], normal, seeded by all tokens up to it."""
    seed = zlib.crc32(np.ascontiguousarray(history).tobytes())
    return np.random.default_rng(seed).standard_normal(size, np.float32)


def make_hash_model(vocab_size: int) -> Model:
    """Logits drawn from a normal distribution that is seeded by the whole history."""

    def model(history: NDArray[np.int32]) -> NDArray[np.float32]:
        seed = zlib.crc32(np.ascontiguousarray(history).tobytes())
        return 2 * np.random.default_rng(seed).standard_normal(vocab_size, np.float32)

    return model


def make_scripted_model(
    vocab_size: int, script: Sequence[tuple[Sequence[int], Sequence[int]]], *, end_token: int
) -> Model:
    """Says `reply`, then `end_token`, after the `prompt` of the first pair whose prompt is found in the history.

    A prompt may be only the end of what is sent, such as the tokens that open the assistant's turn: the last place
    counts, so no reply may hold its own prompt. Where no prompt is found the model says `end_token` at once.
    """
    if not all(prompt for prompt, _ in script):
        raise ValueError("a prompt of the script is empty")

    def model(history: NDArray[np.int32]) -> NDArray[np.float32]:
        logits = np.full(vocab_size, -20, np.float32)
        logits[_get_scripted(history.tolist(), script, end_token)] = 20
        return logits

    return model


def _get_scripted(history: list[int], script: Sequence[tuple[Sequence[int], Sequence[int]]], end_token: int) -> int:
    for prompt, reply in script:
        for end in range(len(history), len(prompt) - 1, -1):
            if history[end - len(prompt) : end] == list(prompt):
                said = len(history) - end
                return reply[said] if said < len(reply) else end_token
    return end_token


def _is_within(values: NDArray[np.int32], limit: int) -> bool:
    return bool(((values >= 0) & (values < limit)).all())


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"bad batch: {message}")
