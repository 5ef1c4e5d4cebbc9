"""How many threads calls get, on machines that are simulated: a call takes what its threads and others make of it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import pytest

from engine.runtime.threads import Threads

Cost = Callable[[int], float]
MEMORY: Cost = {1: 0.024, 2: 0.018}.__getitem__  # a decode step of 1B: one core reads nearly as fast as two
MULTIPLY: Cost = {1: 0.188, 2: 0.098}.__getitem__
TINY: Cost = {1: 0.0001, 2: 0.00016}.__getitem__
BESIDE: Cost = {1: 0.024, 2: 0.035}.__getitem__  # MEMORY, and another program has one core half of the time


class Machine:
    """Its calls, and how many threads they had."""

    def __init__(self, most: int = 2) -> None:
        self.now, self.limit, self.most = 0.0, most, most
        self.counts: list[int] = []
        self.others = 0.0  # processor time of other programs
        self.threads = Threads(most, self.set_limit, lambda: self.now, lambda: self.others)

    def set_limit(self, count: int) -> None:
        self.limit = count

    def run(self, cost: Cost, seconds: float, kind: str = "decode", rows: int = 1, busy: float = 0.0) -> float:
        """Calls for so long, while others use so many cores; calls per second."""
        start = self.now
        before = len(self.counts)
        while self.now < start + seconds:
            with self.threads.share(kind, rows):
                self.counts.append(self.limit)
                took = cost(self.limit)
                self.now += took
                self.others += busy * took
            assert self.limit == self.most
        return (len(self.counts) - before) / (self.now - start)


@pytest.mark.parametrize(("cost", "rows"), [(MEMORY, 1), (MULTIPLY, 64)])
def test_all_threads_where_they_pay(cost: Cost, rows: int) -> None:
    machine = Machine()
    rate = machine.run(cost, 120, rows=rows)
    assert 0.98 < rate * cost(2) <= 1.001
    assert 1 in machine.counts  # it was tried


def test_one_thread_for_short_kernels() -> None:
    machine = Machine()
    machine.run(TINY, 1)
    assert 0.9 < machine.run(TINY, 10) * TINY(1) <= 1.001


def test_one_thread_fewer_beside_another_program_and_back() -> None:
    machine = Machine()
    machine.run(MEMORY, 60)
    machine.run(BESIDE, 1, busy=0.5)
    assert machine.run(BESIDE, 60, busy=0.5) * BESIDE(1) > 0.97
    machine.run(MEMORY, 1)
    assert machine.run(MEMORY, 60) * MEMORY(2) > 0.97


def test_what_runs_for_a_moment_changes_nothing() -> None:
    machine = Machine()
    machine.run(MULTIPLY, 60, rows=64)
    begin = len(machine.counts)
    machine.run(MULTIPLY, 0.2, rows=64, busy=1.0)
    machine.run(MULTIPLY, 5, rows=64)
    assert set(machine.counts[begin:]) == {2}


def test_long_calls_are_compared_by_one_each() -> None:
    """A prompt's chunk of half a second beside a program that never rests, and after it."""
    machine = Machine()
    machine.run(lambda count: 1.0 / count, 20, "prefill", 2048)
    begin = len(machine.counts)
    machine.run(lambda count: 1.0 if count == 1 else 1.5, 9, "prefill", 2048, busy=0.7)
    assert machine.counts[-1] == 1
    machine.run(lambda count: 1.0 / count, 9, "prefill", 2048)
    assert machine.counts[-1] == 2
    assert len(machine.counts) < begin + 30


def test_rare_long_waits_count() -> None:
    """Beside a program that never rests most steps are as fast as ever, and then one waits for its core."""
    machine = Machine()
    waits = cycle([0.0, 0.0, 0.0, 0.0, 0.25])
    machine.run(MEMORY, 10)
    machine.run(lambda count: MEMORY(count) + (next(waits) if count == 2 else 0.0), 4, busy=0.7)
    assert machine.counts[-20:].count(1) >= 15


def test_each_kind_of_call_has_its_own_number() -> None:
    machine = Machine()
    for _ in range(30):
        machine.run(TINY, 0.1, "decode")
        machine.run(MULTIPLY, 1, "prefill", 64)
    begin = len(machine.counts)
    machine.run(TINY, 0.01, "decode")
    assert machine.counts.count(1) > len(machine.counts[begin:]) * 0.9
    begin = len(machine.counts)
    machine.run(MULTIPLY, 1, "prefill", 64)
    assert set(machine.counts[begin:]) == {2}


@pytest.mark.parametrize(("free", "most"), [(16, 16), (15, 16), (14, 16), (7, 8), (4, 8), (2, 3)])
def test_many_cores_of_which_some_are_busy(free: int, most: int) -> None:
    machine = Machine(most)

    def cost(count: int) -> float:
        return 0.1 / count * (1 if count <= free else 2.5)

    machine.run(cost, 60)
    assert machine.run(cost, 60) * cost(free) > 0.95


def test_fewer_threads_than_cores_where_memory_is_the_limit() -> None:
    machine = Machine(16)

    def cost(count: int) -> float:
        return 0.1 / min(count, 4) + 0.001 * count

    machine.run(cost, 60)
    assert machine.run(cost, 60) * cost(4) > 0.9


def test_batches_of_about_one_size_are_compared_by_the_row() -> None:
    machine = Machine()
    for i in range(2000):
        machine.run(lambda count, rows=64 + i % 60: MULTIPLY(count) * rows / 64, 0.001, "prefill", 64 + i % 60)
    assert machine.counts.count(2) > 1950


def test_a_call_that_fails_gives_the_threads_back_and_is_not_counted() -> None:
    machine = Machine()
    machine.run(TINY, 1)

    def fail() -> None:
        with machine.threads.share("decode", 1):
            assert machine.limit == 1
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert machine.limit == 2


def test_one_core_has_no_choice() -> None:
    machine = Machine(1)
    machine.run(lambda count: 0.001, 1)
    assert set(machine.counts) == {1}
