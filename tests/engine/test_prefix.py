"""The prefix cache: what it finds, what it forgets, and that nobody can tell from the replies that it is there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_engines import LIMITS, TOKENIZER, join_by_request, make_ending_model, make_request, run_all

from engine.core import Limits, Output
from engine.engine import Engine
from engine.runtime.fake import FakeExecutor
from engine.scheduler import policy
from engine.scheduler.blocks import PageAllocator
from engine.scheduler.policy import Scheduler, Sequence
from engine.scheduler.prefix import Node, PrefixCache

PIECES = [[1] * 16, [2] * 16, [1] * 8, [2, 1] * 4, [3]]  # joined, these begin alike very often


def make_engine(limits: Limits = LIMITS, prefix_cache: bool = True) -> Engine:
    model = make_ending_model(limits.vocab_size)
    return Engine(FakeExecutor(limits, model), TOKENIZER, prefix_cache=prefix_cache)


def walk(cache: PrefixCache) -> Iterator[tuple[Node, list[Node]]]:
    """Every node with the way to it."""
    ways: list[tuple[Node, list[Node]]] = [(cache._root, [])]
    while ways:
        node, way = ways.pop()
        for child in node.children.values():
            yield child, [*way, child]
            ways.append((child, [*way, child]))


def check_books(scheduler: Scheduler) -> None:
    """Every page has one owner; the counts of the tree are what the sequences say; unread pages go leaves first."""
    cache, allocator = scheduler._cache, scheduler._allocator
    nodes = dict.fromkeys(node for node, _ in walk(cache))
    own = [p for s in scheduler._running for p in s.pages[len(s.nodes) :]]
    used = [page for page, is_used in enumerate(allocator._used) if is_used]
    assert sorted(own + [n.page for n in nodes]) == used
    assert allocator.num_free == len(allocator._used) - len(used)
    assert all(not s.pages and not s.nodes for s in scheduler._waiting)
    for sequence in scheduler._running:
        assert [n.page for n in sequence.nodes] == sequence.pages[: len(sequence.nodes)]
        assert [t for n in sequence.nodes for t in n.key] == sequence.tokens[: 16 * len(sequence.nodes)]
        assert sequence.computed - sequence.lag < 16 * (len(sequence.nodes) + 1) or not cache.enabled
    for node in nodes:
        assert node.readers == sum(node in s.nodes for s in scheduler._running)
        assert (node in cache._unread) == (node.readers == 0)
    for queue in (scheduler._running, scheduler._waiting):
        assert [s.rank for s in queue] == sorted(s.rank for s in queue)
    order = {node: i for i, node in enumerate(cache._unread)}
    assert all(order[n] < order[n.parent] for n in order if n.parent in order)


prompts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map(lambda pieces: sum(pieces, [])[:80])
traffic = st.lists(
    st.tuples(
        st.integers(0, 6),
        prompts,
        st.integers(1, 40),
        st.one_of(st.none(), st.integers(0, 30)),
        st.sampled_from([0, 0, 0, -1, 3]),
    ),
    max_size=10,
)
limits = st.builds(
    Limits,
    context_window=st.just(96),
    prefill_chunk=st.integers(1, 40),
    max_batch=st.integers(1, 5),
    page_size=st.just(16),
    num_pages=st.integers(6, 20),
    vocab_size=st.just(258),
)


def play(engine: Engine, traffic: list) -> dict[str, Output]:
    """Add and abort at the given steps, checking the books after each."""
    events: dict[int, list] = {}
    now = 0
    for i, (delay, prompt, count, patience, priority) in enumerate(traffic):
        now += delay
        request = make_request(str(i), prompt, max_tokens=count, seed=i, temperature=float(i % 2))
        request = replace(request, priority=priority)
        events.setdefault(now, []).append(lambda r=request: engine.add(r))
        if patience is not None:
            events.setdefault(now + patience, []).append(lambda i=i: engine.abort(str(i)))
    outputs: list[Output] = []
    for step in range(5000):
        outputs += [o for event in events.pop(step, []) if (o := event()) is not None]
        if engine.has_work:
            outputs += engine.step()
        elif not events:
            break
        check_books(engine._scheduler)
    return join_by_request(outputs)


@given(traffic, limits, st.sampled_from([16, 64]))
@settings(max_examples=60, deadline=None)
def test_nobody_can_tell(traffic: list, limits: Limits, worth_waiting: int) -> None:
    with_cache, without = make_engine(limits), make_engine(limits, prefix_cache=False)
    with mock.patch.object(policy, "WORTH_WAITING", worth_waiting):
        replies, wanted = play(with_cache, traffic), play(without, traffic)
    for name, output in replies.items():
        if "abort" in (output.finish_reason, wanted[name].finish_reason):  # steps differ, so one may have come further
            shorter, longer = sorted((output.token_ids, wanted[name].token_ids), key=len)
            assert longer[: len(shorter)] == shorter
        else:
            assert (output.text, output.token_ids) == (wanted[name].text, wanted[name].token_ids)
        assert output.usage.cached_tokens < len(traffic[int(name)][1])
    for engine in (with_cache, without):
        stats = engine.get_stats()
        assert (stats.running, stats.waiting, stats.free_pages) == (0, 0, stats.num_pages)
    stats = without.get_stats()
    assert (stats.cached_tokens, stats.cached_pages, stats.evictions) == (0, 0, 0)


def test_hits_are_counted() -> None:
    engine = make_engine()
    prompt = list(range(40))
    wanted = []
    for name, tokens in (("first", prompt), ("same", prompt), ("longer", [*prompt[:33], 9]), ("other", [7, *prompt])):
        engine.add(make_request(name, tokens, temperature=0.0, max_tokens=1))
        wanted.append(run_all(engine)[name].usage.cached_tokens)
    assert wanted == [0, 32, 32, 0]
    stats = engine.get_stats()
    assert (stats.prompt_tokens, stats.cached_tokens, stats.cached_pages, stats.evictions) == (155, 64, 4, 0)


def test_the_last_token_of_a_prompt_always_runs() -> None:
    engine = make_engine()
    for _ in range(2):
        engine.add(make_request("a", [5] * 32, temperature=0.0, max_tokens=1))
        usage = run_all(engine)["a"].usage
    assert usage.cached_tokens == 16


def test_a_second_turn_reads_the_reply_of_the_first() -> None:
    engine = make_engine()
    prompt = list(range(20))
    engine.add(make_request("1", prompt, temperature=0.0, max_tokens=45, ignore_eos=True))
    reply = list(run_all(engine)["1"].token_ids)
    engine.add(make_request("2", [*prompt, *reply, *range(5)], temperature=0.0, max_tokens=1))
    assert run_all(engine)["2"].usage.cached_tokens == 64  # of 65: the last token of a reply never runs


def test_a_preempted_sequence_finds_its_pages_again() -> None:
    limits = Limits(96, 40, 4, 16, 8, 258)
    engine = make_engine(limits)
    for i in range(3):
        engine.add(make_request(str(i), [i] * 30, temperature=0.0, max_tokens=30, ignore_eos=True))
    outputs = run_all(engine)
    assert engine.get_stats().preemptions > 0
    assert {o.usage.cached_tokens for o in outputs.values()} == {0}  # what a request itself had computed is no hit


def test_running_requests_share() -> None:
    engine = make_engine()
    engine.add(make_request("a", [1] * 40, temperature=0.0, max_tokens=5, ignore_eos=True))
    engine.step()
    engine.step()
    free = engine.get_stats().free_pages
    for name in "bc":
        engine.add(make_request(name, [1] * 40, temperature=0.0, max_tokens=5, ignore_eos=True))
    engine.step()
    assert engine.get_stats().free_pages == free - 2  # one page each for the tokens after 32
    assert engine.get_stats().cached_pages == 0  # they are in use


@pytest.mark.parametrize(("prefix_cache", "computed"), [(True, 100 + 3 * 4 + 5), (False, 4 * 100 + 5)])
def test_those_that_come_together_compute_their_beginning_once(prefix_cache: bool, computed: int) -> None:
    scheduler = Scheduler(Limits(256, 512, 8, 16, 64, 258), prefix_cache=prefix_cache)
    for name in "abcd":
        scheduler.add(Sequence(name, [1] * 100))
    scheduler.add(Sequence("other", [2] * 5))
    batches: list[list[tuple[str, int]]] = []
    while len(batches) < 2:
        chunks = [c for c in scheduler.schedule() if c.sequence.pending]
        batches.append([(c.sequence.request_id, c.count) for c in chunks])
        for chunk in chunks:
            scheduler.advance(chunk)
    assert sum(count for batch in batches for _, count in batch) == computed
    assert (len(batches[0]) == 1) == prefix_cache


def make_cache(num_pages: int, page_size: int = 2) -> tuple[PrefixCache, PageAllocator]:
    allocator = PageAllocator(num_pages)
    return PrefixCache(allocator, page_size), allocator


def insert(cache: PrefixCache, allocator: PageAllocator, tokens: list[int]) -> list[Node]:
    nodes: list[Node] = []
    for i in range(0, len(tokens), 2):
        node = cache.insert(nodes[-1] if nodes else None, tokens[i : i + 2], allocator.allocate(1)[0])
        assert node is not None
        nodes.append(node)
    return nodes


def test_the_longest_unused_page_goes_first() -> None:
    cache, allocator = make_cache(8)
    old = insert(cache, allocator, [1, 2, 3, 4])
    new = insert(cache, allocator, [1, 2, 5, 6])
    cache.leave(old)
    cache.leave(new)
    again = cache.find([1, 2, 3, 4, 0], 5)
    assert again == old
    cache.hold(again)
    cache.leave(again)  # so [5, 6] is the one that was left the longest ago
    assert (allocator.num_free, cache.num_unread) == (5, 3)
    cache.evict(1)
    assert (allocator.num_free, cache.num_unread, cache.evictions) == (6, 2, 1)
    assert cache.find([1, 2, 5, 6], 4) == old[:1]
    cache.evict(2)
    assert (allocator.num_free, cache.find([1, 2, 3, 4], 4)) == (8, [])


def test_pages_that_are_read_stay() -> None:
    cache, allocator = make_cache(4)
    nodes = insert(cache, allocator, [1, 2, 3, 4])
    with pytest.raises(KeyError):
        cache.evict(1)
    cache.leave(nodes)
    cache.hold(nodes[:1])
    cache.evict(1)
    assert cache.find([1, 2, 3, 4], 4) == nodes[:1]


def test_a_page_that_is_there_twice_is_freed_once() -> None:
    cache, allocator = make_cache(4)
    first = insert(cache, allocator, [1, 2])
    second = insert(cache, allocator, [1, 2])
    assert (second, first[0].readers, allocator.num_free) == (first, 2, 3)


def test_a_scheduler_swaps_a_page_that_another_has_computed_too() -> None:
    scheduler = Scheduler(LIMITS)
    pair = [Sequence(name, [1] * 20) for name in "ab"]
    for sequence in pair:
        scheduler.add(sequence)
    for _ in range(2):
        for chunk in scheduler.schedule():
            scheduler.advance(chunk)
    assert pair[0].pages[0] == pair[1].pages[0]
    assert pair[0].pages[1] != pair[1].pages[1]
    assert scheduler.num_free_pages == LIMITS.num_pages - 3
    check_books(scheduler)
