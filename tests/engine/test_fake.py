"""The fake executor refuses every batch that a real one would silently compute nonsense from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from small_engines import END, LIMITS

from engine.core import Batch
from engine.runtime.fake import FakeExecutor, make_scripted_model


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def make_batch() -> Batch:
    """A decode at position 0, and three tokens of a prompt."""
    return Batch(ints(5, 6, 7, 8), ints(0, 0, 1, 2), ints(0, 1, 1, 1), ints(3, 4).reshape(2, 1), ints(0, 3))


def test_a_good_batch() -> None:
    executor = FakeExecutor(LIMITS)
    logits = executor.run(make_batch())
    assert (logits.shape, logits.dtype) == ((2, 258), np.float32)
    assert np.array_equal(logits, FakeExecutor(LIMITS).run(make_batch()))
    empty = replace(make_batch(), logit_rows=ints())
    assert FakeExecutor(LIMITS).run(empty).shape == (0, 258)


BAD = [
    ({"tokens": np.array([5, 6, 7, 8])}, "not all arrays are int32"),
    ({"page_table": ints(3, 4)}, "an array has the wrong number of axes"),
    ({"tokens": ints(5, 6, 7)}, "tokens, positions and rows differ in length"),
    ({"tokens": ints(5, 6, 7, 258)}, "a token is not in the vocabulary"),
    ({"positions": ints(0, 126, 127, 128)}, "a position is outside of the context"),
    ({"positions": ints(0, 0, 2, 3)}, "positions of a sequence are not contiguous"),
    ({"positions": ints(0, 15, 16, 17)}, "row 1 has no page for position 17"),
    ({"positions": ints(0, 5, 6, 7)}, "row 1 has pages that it did not write"),
    ({"rows": ints(0, 0, 0, 0)}, "a row of the page table has no token"),
    ({"rows": ints(1, 0, 1, 1)}, "the tokens of a sequence are not adjacent"),
    ({"page_table": ints(3, 20).reshape(2, 1)}, "there is no such page"),
    ({"page_table": ints(3, 3).reshape(2, 1)}, "pages [3] of row 0 are in another row too"),
    ({"logit_rows": ints(3, 0)}, "logit_rows do not rise"),
    ({"logit_rows": ints(4)}, "logits are wanted of a token that is not there"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_batches(changes: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        FakeExecutor(LIMITS).run(replace(make_batch(), **changes))
    assert str(caught.value) == f"bad batch: {message}"


def test_too_much() -> None:
    many = np.arange(25, dtype=np.int32)
    with pytest.raises(ValueError, match="25 tokens, limit 24"):
        FakeExecutor(LIMITS).run(Batch(many, many, np.zeros(25, np.int32), ints(0, 1).reshape(1, 2), ints()))
    five = np.arange(5, dtype=np.int32)
    with pytest.raises(ValueError, match="5 sequences, limit 4"):
        FakeExecutor(LIMITS).run(Batch(five, np.zeros(5, np.int32), five, five.reshape(5, 1), ints()))
    executor = FakeExecutor(LIMITS)
    executor.close()
    with pytest.raises(ValueError, match="run after close"):
        executor.run(make_batch())


def test_another_page_is_another_history() -> None:
    executor = FakeExecutor(LIMITS)
    executor.run(make_batch())
    follow = Batch(ints(9), ints(1), ints(0), ints(3).reshape(1, 1), ints(0))
    right = executor.run(follow)
    assert not np.array_equal(right, executor.run(replace(follow, page_table=ints(4).reshape(1, 1))))


def test_forks_share_pages_that_are_only_read() -> None:
    executor = FakeExecutor(LIMITS)
    prompt = np.arange(20, dtype=np.int32)
    executor.run(Batch(prompt, prompt, np.zeros(20, np.int32), ints(0, 1).reshape(1, 2), ints()))
    executor.copy_page(1, 2)
    fork = Batch(ints(7, 7), ints(20, 20), ints(0, 1), np.array([[0, 1], [0, 2]], np.int32), ints(0, 1))
    logits = executor.run(fork)
    assert np.array_equal(logits[0], logits[1])
    with pytest.raises(ValueError, match=r"pages \[1\] of row 0 are in another row too"):
        executor.run(replace(fork, page_table=np.array([[0, 1], [0, 1]], np.int32)))


def test_script() -> None:
    model = make_scripted_model(258, [(b"Q", b"xy"), (b"b", b"z")], end_token=END)
    histories = (b"aQ", b"aQx", b"aQxy", b"b", b"c")
    said = [int(np.argmax(model(np.frombuffer(h, np.uint8).astype(np.int32)))) for h in histories]
    assert said == [*b"xy", END, ord("z"), END]
    with pytest.raises(ValueError, match="a prompt of the script is empty"):
        make_scripted_model(258, [(b"", b"z")], end_token=END)
