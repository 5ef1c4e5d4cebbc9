"""doit bench within its time and after an interruption: fakes instead of a model, peers and a clock."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.bench import speed as speed_module
from engine.bench.cases import Case, make_cases
from engine.bench.pace import Pace, Rates, describe
from engine.bench.peers import Program
from engine.bench.record import get_partial, load_partial, make_identity, make_record
from engine.bench.session import Session
from engine.bench.speed import HERE, Roofline, Samples, Turn, measure_speed
from engine.bench.speed_report import make_lines, make_text
from engine.core import Batch, Limits
from engine.errors import InvalidSetting
from engine.runtime.fake import FakeExecutor

LIMITS = Limits(context_window=2560, prefill_chunk=512, max_batch=4, page_size=16, num_pages=160, vocab_size=256)
ROOFLINE = Roofline(lambda: 0.5, lambda: 2.0, 1000, position_bytes=10, operations=8000, count_operations=lambda _: 1)
MOMENT = 1e-6
MACHINE = {"cpu": "a fake", "threads": 2}
SHORT = [Case("prefill 8", 1, 8, 0), Case("decode", 1, 1, 0)]


class Clock:
    """Moves when somebody works."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class TimedExecutor(FakeExecutor):
    """Takes a moment of the clock for each token, and counts kernels."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(LIMITS)
        self.clock = clock

    def run(self, batch: Batch) -> Any:
        self.clock.now += MOMENT * len(batch.tokens)
        return np.zeros((len(batch.logit_rows), self.limits.vocab_size), np.float32)

    def count_kernels(self, batch: Batch) -> dict[str, int]:
        return {"linear": len(batch.tokens)}


class SlowPeer:
    """Takes so many seconds of the clock for each token, and may end as a program does that somebody kills."""

    def __init__(self, clock: Clock, seconds: float, ends_after: float = float("inf")) -> None:
        self.clock, self.seconds, self.ends_after, self.closed = clock, seconds, ends_after, False

    def prepare(self, case: Case) -> None:
        self.clock.now += self.seconds * case.context

    def run(self, case: Case) -> None:
        self.clock.now += self.seconds * case.new
        self.ends_after -= 1
        if self.ends_after < 0:
            raise KeyboardInterrupt

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time of all of the benchmark."""
    clock = Clock()
    monkeypatch.setattr(speed_module.time, "perf_counter", clock)
    monkeypatch.setattr(speed_module.time, "sleep", lambda seconds: None)
    return clock


@pytest.fixture
def make_session(tmp_path: Path, clock: Clock) -> Callable[..., Session]:
    """A session of two short cases, in a folder as artifacts/ is one."""

    def make(cases: list[Case] = SHORT, record: dict[str, Any] | None = None, seconds: float = 1e9) -> Session:
        record = record or {**make_record("m/q/t", MACHINE, 3, 10, []), "identity": {"of": "this"}}
        path, executor = tmp_path / "reports" / "bench-m.json", TimedExecutor(clock)
        say = lambda text, fraction=None: None  # noqa: E731
        return Session(tmp_path, executor, ROOFLINE, cases, record, path, Pace(seconds, clock), say)  # type: ignore[arg-type]

    return make


def make_program(peer: SlowPeer, name: str = "slow") -> Program:
    return Program(name, f"{name} 1.0", 1 << 20, lambda folder, threads: peer)


def test_cases_that_take_too_long_are_left_out(clock: Clock) -> None:
    """128 + 512 + 2,048 + 2,010 + 10 + 40 tokens a round, a second each: 4,748; three rounds and one to warm up."""
    peers, cases = {"slow": SlowPeer(clock, 1.0)}, make_cases(LIMITS)
    for seconds, expected in [
        (20_000, [c.name for c in cases]),
        (15_000, [c.name for c in cases if c.name != "prefill 2,048"]),
        (3_500, ["prefill 128", "prefill 512", "decode", "decode, batch 4"]),
        (418, ["decode", "decode, batch 4"]),  # there is no time for three rounds of both
        (1, ["decode"]),  # one at least
    ]:
        pace = Pace(seconds, clock)
        start = clock.now
        speed = measure_speed(TimedExecutor(clock), 3, peers=peers, cases=cases, pace=pace)
        assert [f.name for f in speed.figures] == expected
        assert set(pace.left_out) == {c.name for c in cases} - set(expected)
        assert clock.now - start < seconds + 280  # what it takes to see how fast it is
        assert (pace.lacking > 0) == bool(pace.left_out)
    assert pace.left_out["decode at 2,000"] == "a round of it takes about 34 min"


def test_rounds_end_with_the_time(clock: Clock) -> None:
    peer, pace = SlowPeer(clock, 1.0), Pace(600, clock)
    speed = measure_speed(TimedExecutor(clock), 50, peers={"slow": peer}, cases=[Case("decode", 1, 1, 0)], pace=pace)
    (figure,) = speed.figures
    assert figure.rounds == (600 - 256 - 2 - 1) // 10  # and a moment for our own turns
    assert pace.lacking == pytest.approx((50 - figure.rounds) * 10, rel=1e-3)


def test_a_turn_is_guessed_before_it_was_measured() -> None:
    ours, theirs = Rates(0.5, 2.0, fills=False), Rates(0.5, 2.0, fills=True)
    assert ours.guess(Case("", 1, 100, 0)) == 50
    assert ours.guess(Case("", 4, 1, 2000)) == 10 * (2 + 4 * 0.5)
    assert theirs.guess(Case("", 4, 1, 2000)) == pytest.approx(1000 + 10 * (2 + 4 * 0.5) + 0.6)
    assert [describe(seconds) for seconds in (0.2, 89, 91, 3601)] == ["1 s", "89 s", "2 min", "60 min"]


def test_what_runs_and_how_long_it_will_take_is_said(clock: Clock) -> None:
    said: list[str] = []
    peers = {"slow": SlowPeer(clock, 1.0)}
    measure_speed(TimedExecutor(clock), 2, None, lambda text, part=None: said.append(text), peers, SHORT)
    assert said == [
        "prefill 8, mlcbuild, warm up",
        "prefill 8, slow, warm up",
        "decode, mlcbuild, warm up; about 16 s left",
        "decode, slow, warm up; about 16 s left",
        "prefill 8, mlcbuild, round 1 of 2; about 36 s left",
        "prefill 8, slow, round 1 of 2; about 36 s left",
        "decode, mlcbuild, round 1 of 2; about 28 s left",
        "decode, slow, round 1 of 2; about 28 s left",
        "prefill 8, mlcbuild, round 2 of 2; about 18 s left",
        "prefill 8, slow, round 2 of 2; about 18 s left",
        "decode, mlcbuild, round 2 of 2; about 10 s left",
        "decode, slow, round 2 of 2; about 10 s left",
    ]


def test_an_interrupted_bench_goes_on(make_session: Callable[..., Session], clock: Clock) -> None:
    """4 runs to see how fast it is, 1 to warm up, 11 a round: the interrupt comes in the decode steps of the second."""
    peer = SlowPeer(clock, 1.0, ends_after=4 + 1 + 11 + 5)
    first = make_session()
    with pytest.raises(KeyboardInterrupt):
        first.measure_programs([[make_program(peer)]], 2)
    assert peer.closed
    path = get_partial(first.path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["bench-m.partial.json", "bench-m.partial.txt"]
    left = json.loads(path.read_text())
    assert (left["complete"], [f["rounds"] for f in left["figures"]]) == (False, [2, 1])
    assert path.with_suffix(".txt").read_text().startswith("PARTIAL: m/q/t on a fake, 2 threads (reads 0.0 GB/s")
    record = load_partial(first.path, {"of": "this"})
    assert record is not None
    assert load_partial(first.path, {"of": "that"}) is None
    second = make_session(record=record)
    calls = SlowPeer(clock, 1.0, ends_after=4 + 1 + 10 + 11)  # what is left, and not one more
    second.measure_programs([[make_program(calls)]], 2)
    second.finish()
    assert calls.ends_after == 0
    assert sorted(p.name for p in path.parent.iterdir()) == ["bench-m.json", "bench-m.txt"]
    whole = json.loads(second.path.read_text())
    assert (whole["complete"], [f["rounds"] for f in whole["figures"]]) == (True, [3, 3])
    assert whole["turns"][:3] == left["turns"]
    assert whole["kernels"] == {"linear": 1}
    assert load_partial(first.path, {"of": "this"}) is None
    assert "PARTIAL" not in second.path.with_suffix(".txt").read_text()


def test_a_damaged_file_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    path = tmp_path / "bench-m.json"
    for text in ("{", "[]", '{"identity": 3}'):
        get_partial(path).write_text(text)
        assert load_partial(path, {"of": "this"}) is None


def test_peers_that_do_not_fit_together_each_get_their_part(make_session: Callable[..., Session], clock: Clock) -> None:
    """600 s: 300 for the first, the rest for the second, which is loaded when the first is closed."""
    session = make_session(SHORT, None, 2000)
    session.record["rounds"] = 2
    one, other = SlowPeer(clock, 0.1), SlowPeer(clock, 0.1)

    def load(folder: Path, threads: int) -> SlowPeer:
        assert one.closed
        assert folder.is_dir()
        return other

    speed = session.measure_programs([[make_program(one, "one")], [Program("other", "other 1", 1, load)]], 2)
    assert other.closed
    prefill, decode = speed.figures
    assert (prefill.rounds, set(prefill.peers)) == (4, {"one", "other"})
    assert decode.peers["one"].rate == pytest.approx(10)
    ours, theirs = decode.rate, decode.peers["other"].rate
    assert theirs == pytest.approx(10)
    assert ours > 0


def test_a_session_without_a_case_that_fits_is_refused(make_session: Callable[..., Session]) -> None:
    with pytest.raises(InvalidSetting) as caught:
        make_session([Case("decode, batch 32", 32, 1, 0)])
    assert str(caught.value) == (
        "no case is left: decode, batch 32: the package takes 4 sequences at once\n"
        "  hint: give other cases=, or none for all that fit"
    )


def test_the_report_names_all_that_is_missing() -> None:
    record = make_record("m/q/t", MACHINE, 5, 10, [Program("slow", "slow 1.0", 1, lambda folder, threads: None)])  # type: ignore[arg-type,return-value]
    samples = Samples([Turn("decode", {HERE: [0.5], "slow": [1.0]}, [0.5]), Turn("decode", {HERE: [0.5]}, [0.25])])
    speed = speed_module.make_speed(samples, SHORT, ROOFLINE)
    record |= {"figures": speed_module.to_record(speed.figures), "complete": True, "minutes_for_all": 14}
    record |= {"left_out": {"prefill 2,048": "a round of it takes about 9 min"}}
    assert make_lines(record) == [
        "left out: prefill 2,048: a round of it takes about 9 min",
        "the time was up after 2 of 5 rounds",
        "minutes=14 would do for all of it",
    ]
    text = make_text(record)
    assert "decode" in text
    assert "1.0, 2.00 x" in text
    assert "0.75" in text  # of the roofline: the middle of 1.0 and 0.5


def test_an_identity_is_of_the_package_the_engine_and_the_settings(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    identity = make_identity(tmp_path, {"rounds": 5})
    assert identity == make_identity(tmp_path, {"rounds": 5}) == json.loads(json.dumps(identity))
    assert identity != make_identity(tmp_path, {"rounds": 6})
    (tmp_path / "manifest.json").write_text("{ }")
    assert identity != make_identity(tmp_path, {"rounds": 5})
