"""How far ahead to guess: as far as it has been right lately, and only where that saves time."""

from __future__ import annotations

import pytest
from small_engines import LIMITS, TOKENIZER, make_request, run_all
from test_lookup import make_repetitive_model

from engine.core import Batch
from engine.engine import Engine
from engine.runtime.fake import FakeExecutor
from engine.scheduler.pace import LONGEST_PAUSE, LOOK_AGAIN, Cost, Pace, choose_length


class Clock:
    """Seconds that pass only where somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SlowExecutor(FakeExecutor):
    """Takes `seconds` for a batch and a hundredth of that for each of its tokens."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__(LIMITS, make_repetitive_model(LIMITS.vocab_size))
        self.clock, self.seconds = clock, seconds

    def run(self, batch: Batch):
        self.clock.now += self.seconds * (1 + len(batch.tokens) / 100)
        return super().run(batch)


def measure(seconds: float, draft_tokens: int = 6) -> tuple[float, int]:
    """Seconds of 100 tokens where a batch of the large model takes 1 s, and how often its draft has guessed."""
    clock = Clock()
    engine = Engine(
        SlowExecutor(clock, 1.0),
        TOKENIZER,
        draft_tokens=draft_tokens,
        draft=SlowExecutor(clock, seconds),
        clock=clock,
    )
    engine.add(make_request("a", "xyz", temperature=0.0, max_tokens=100, ignore_eos=True))
    assert run_all(engine)["a"].usage.completion_tokens == 100
    return clock.now, engine.get_stats().guesses


@pytest.mark.parametrize(
    ("rate", "cost", "length"),
    [
        (0.0, 0.0, 0),
        (0.5, 0.0, 8),
        (1.0, 0.9, 8),
        (1.0, 1.1, 0),
        (0.7, 0.1, 4),
        (0.7, 0.3, 2),
        (0.7, 0.75, 0),
        (0.3, 0.1, 1),
    ],
)
def test_the_best_length(rate: float, cost: float, length: int) -> None:
    """The table is the formula by hand: (1 + rate + ... + rate^n) / (1 + n cost), the largest, if above 1."""
    assert choose_length(rate, cost, 8) == length


def test_costs_are_measured_against_plain_batches() -> None:
    cost = Cost()
    assert cost.get(2) is None
    cost.observe(2, 0, 0.0, 1.0)
    assert cost.get(2) == 0.0
    assert cost.get(3) is None
    cost.observe(2, 4, 0.8, 1.2)  # a second more than a plain one, for four
    assert cost.get(2) == pytest.approx(0.25)
    for _ in range(LOOK_AGAIN):
        cost.observe(2, 1, 0.0, 0.9)
    assert cost.get(2) is None  # time to look
    cost.observe(2, 0, 0.0, 1.0)
    assert cost.get(2) == 0.0


def test_what_does_not_pay_is_tried_once_in_a_while() -> None:
    pace = Pace(6)
    lengths = [pace.get_length(2.0) for _ in range(2 * LONGEST_PAUSE + 2)]
    assert lengths == [1, *[0] * LONGEST_PAUSE, 1, *[0] * LONGEST_PAUSE]
    assert pace.get_length(0.0) == 2


def test_a_quick_draft_saves_time_and_a_slow_one_costs_little() -> None:
    plain, none = measure(0.1, draft_tokens=0)
    assert none == 0
    quick, many = measure(0.1)
    assert quick < plain / 2
    assert many > 10
    slow, few = measure(1.5)
    assert slow < 1.1 * plain
    assert 1 <= few <= 6
