"""The scheduler under any traffic: everything ends, no page leaks, and no request feels the others."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from small_engines import LIMITS, join_by_request, make_engine, make_request, run_all

import engine.scheduler
from engine.core import Limits, Output
from engine.engine import Engine
from engine.scheduler.policy import Chunk, Scheduler, Sequence

requests = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(0, 255), min_size=1, max_size=70),
        "max_tokens": st.one_of(st.none(), st.integers(1, 40)),
        "temperature": st.sampled_from([0.0, 1.0]),
        "top_p": st.sampled_from([1.0, 0.9]),
        "stop": st.sampled_from([(), ("e",), ("ab", "q")]),
        "ignore_eos": st.booleans(),
        "seed": st.integers(0, 100),
    }
)
traffic = st.lists(st.tuples(st.integers(0, 6), requests, st.one_of(st.none(), st.integers(0, 30))), max_size=8)
limits = st.builds(
    Limits,
    context_window=st.just(96),
    prefill_chunk=st.integers(1, 40),
    max_batch=st.integers(1, 5),
    page_size=st.just(16),
    num_pages=st.integers(6, 14),
    vocab_size=st.just(258),
)


def is_idle(engine: Engine) -> bool:
    stats = engine.get_stats()
    return not engine.has_work and (stats.running, stats.waiting) == (0, 0) and stats.free_pages == stats.num_pages


@given(traffic, limits)
@settings(max_examples=60, deadline=None)
def test_any_traffic_gives_what_each_request_gives_alone(traffic: list, limits: Limits) -> None:
    engine = make_engine(limits)
    events: dict[int, list] = {}
    now = 0
    for i, (delay, request, patience) in enumerate(traffic):
        now += delay
        events.setdefault(now, []).append(lambda i=i, r=request: engine.add(make_request(str(i), **r)))
        if patience is not None:
            events.setdefault(now + patience, []).append(lambda i=i: engine.abort(str(i)))
    outputs: list[Output] = []
    for step in range(5000):
        outputs += [o for event in events.pop(step, []) if (o := event()) is not None]
        if engine.has_work:
            outputs += engine.step()
        elif not events:
            break
    assert is_idle(engine)
    together = join_by_request(outputs)
    for i, (_, request, patience) in enumerate(traffic):
        output = together[str(i)]
        alone = make_engine(limits)
        alone.add(make_request(str(i), **request))
        wanted = run_all(alone)[str(i)]
        if output.finish_reason == "abort":
            assert patience is not None
            assert wanted.text.startswith(output.text)
            assert wanted.token_ids[: len(output.token_ids)] == output.token_ids
        else:
            assert (output.text, output.token_ids, output.finish_reason) == (
                wanted.text,
                wanted.token_ids,
                wanted.finish_reason,
            )


def test_pages_run_out_and_everything_still_ends() -> None:
    engine = make_engine(Limits(96, 40, 4, 16, 8, 258))
    for i in range(4):
        engine.add(make_request(str(i), [i] * 20, temperature=0.0, ignore_eos=True))
    outputs = run_all(engine)
    assert {o.finish_reason for o in outputs.values()} == {"length"}
    assert {o.usage.total_tokens for o in outputs.values()} == {96}
    assert engine.get_stats().preemptions > 0
    assert is_idle(engine)


def make_scheduler(**changes: int) -> Scheduler:
    values = {name: getattr(LIMITS, name) for name in Limits.__slots__} | changes
    return Scheduler(Limits(**values))


def run_once(scheduler: Scheduler) -> list[tuple[str, int, int]]:
    """One batch; every sequence that reaches its end gets one more token."""
    chunks: list[Chunk] = scheduler.schedule()
    for chunk in chunks:
        scheduler.advance(chunk)
        if chunk.samples:
            chunk.sequence.tokens.append(1)
    return [(c.sequence.request_id, c.start, c.count) for c in chunks]


def test_a_long_prompt_delays_the_others_by_one_chunk() -> None:
    scheduler = make_scheduler()
    scheduler.add(Sequence("short", [1] * 3))
    assert run_once(scheduler) == [("short", 0, 3)]
    scheduler.add(Sequence("long", [1] * 60))
    scheduler.add(Sequence("next", [1] * 5))
    assert run_once(scheduler) == [("short", 3, 1), ("long", 0, 18), ("next", 0, 5)]
    assert run_once(scheduler) == [("short", 4, 1), ("next", 5, 1), ("long", 18, 22)]
    scheduler.add(Sequence("another", [2] * 30))
    assert run_once(scheduler) == [("short", 5, 1), ("next", 6, 1), ("long", 40, 20), ("another", 0, 2)]
    assert run_once(scheduler) == [("short", 6, 1), ("long", 60, 1), ("next", 7, 1), ("another", 2, 21)]


def test_long_prompts_share_a_chunk() -> None:
    """Each leaves half of what is left to the next, so that a short one behind them begins at once."""
    scheduler = make_scheduler(num_pages=40)
    for number in range(2):
        scheduler.add(Sequence(f"long{number}", [number + 5] * 100))
    scheduler.add(Sequence("short", [1] * 5))
    assert run_once(scheduler) == [("long0", 0, 13), ("long1", 0, 6), ("short", 0, 5)]
    assert run_once(scheduler) == [("short", 5, 1), ("long0", 13, 12), ("long1", 6, 11)]


def test_a_long_prompt_that_is_urgent_shares_with_its_like() -> None:
    scheduler = make_scheduler(num_pages=40)
    scheduler.add(Sequence("short", [1] * 5))
    scheduler.add(Sequence("urgent", [5] * 60, priority=-1))
    assert run_once(scheduler) == [("urgent", 0, 24)]
    scheduler.add(Sequence("urgent too", [6] * 5, priority=-1))
    assert run_once(scheduler) == [("urgent", 24, 14), ("urgent too", 0, 5), ("short", 0, 5)]


def test_nobody_overtakes() -> None:
    scheduler = make_scheduler(num_pages=6)
    scheduler.add(Sequence("first", [1] * 60))
    scheduler.add(Sequence("large", [1] * 60))
    scheduler.add(Sequence("small", [1]))
    assert [name for name, _, _ in run_once(scheduler)] == ["first"]
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_free_pages) == (1, 2, 2)


def test_the_urgent_overtake_those_that_wait_and_displace_those_that_run() -> None:
    scheduler = make_scheduler(max_batch=2)
    sequences = {p: Sequence(f"p{p}", [p + 5] * 20, priority=p) for p in (2, 1, 0, -1)}
    for priority in (2, 1):
        scheduler.add(sequences[priority])
    assert run_once(scheduler) == [("p1", 0, 20), ("p2", 0, 4)]
    scheduler.add(sequences[0])
    assert run_once(scheduler) == [("p1", 20, 1), ("p0", 0, 20)]  # with p1 and p0, both places are taken
    assert (scheduler.preemptions, scheduler.num_waiting) == (1, 1)
    scheduler.add(sequences[-1])
    assert run_once(scheduler) == [("p0", 20, 1), ("p-1", 0, 20)]
    for _ in range(2):
        assert [name for name, _, _ in run_once(scheduler)] == ["p-1", "p0"]
    scheduler.remove(sequences[-1])
    assert run_once(scheduler) == [("p0", 23, 1), ("p1", 16, 6)]  # the first page comes from the prefix cache


def test_equal_priorities_displace_nobody() -> None:
    scheduler = make_scheduler(max_batch=1)
    for name in "ab":
        scheduler.add(Sequence(name, [1] * 4))
    for _ in range(3):
        assert [name for name, _, _ in run_once(scheduler)] == ["a"]
    assert scheduler.preemptions == 0


@given(st.integers(1, 6), st.integers(25, 90), st.integers(8, 24))
@settings(max_examples=30, deadline=None)
def test_no_gap_between_tokens_is_longer_than_one_chunk(decoding: int, length: int, chunk: int) -> None:
    """Every batch while long prompts are read has a token for each that decodes, and is no longer than a chunk."""
    engine = make_engine(Limits(128, chunk, 8, 16, 80, 258))
    for i in range(decoding):
        engine.add(make_request(str(i), [i], temperature=0.0, ignore_eos=True, max_tokens=100))
    engine.step()
    for i in range(2):
        engine.add(make_request(f"long{i}", [7] * length + [i], temperature=0.0, max_tokens=1))
    while any(name.startswith("long") for name in engine._requests):
        outputs = engine.step()
        assert {str(i) for i in range(decoding)} <= {o.request_id for o in outputs}


def test_the_youngest_gives_its_pages_back() -> None:
    scheduler = make_scheduler(num_pages=6)
    old, young = Sequence("old", [1] * 20), Sequence("young", [1] * 4)
    scheduler.add(old)
    scheduler.add(young)
    run_once(scheduler)
    old.tokens += [1] * 60  # as if it had been generating for a while
    old.computed = len(old.tokens) - 1
    run_once(scheduler)
    assert (len(old.pages), len(young.pages), scheduler.preemptions) == (6, 0, 1)
    scheduler.remove(old)
    assert run_once(scheduler) == [("young", 0, 5)]


def test_abort_frees_pages_at_once() -> None:
    scheduler = make_scheduler()
    sequences = [Sequence(str(i), [1] * 40) for i in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    run_once(scheduler)
    assert scheduler.num_free_pages < 20
    for sequence in sequences:
        scheduler.remove(sequence)
    assert (scheduler.num_free_pages, scheduler.num_running, scheduler.num_waiting) == (20, 0, 0)


def test_the_scheduler_imports_no_tensor_library() -> None:
    allowed = set(sys.stdlib_module_names) | {"engine"}
    for path in Path(engine.scheduler.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {n.split(".")[0] for n in names} <= allowed, path
            own = {n for n in names if n.startswith("engine")}
            assert all(n == "engine.core" or n.startswith("engine.scheduler.") for n in own), path
