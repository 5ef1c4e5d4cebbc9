"""The page allocator: no page has two owners, none is lost, and runs stay together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.scheduler.blocks import PageAllocator


def count_runs(pages: list[int]) -> int:
    return 1 + sum(b != a + 1 for a, b in zip(pages, pages[1:], strict=False))


def longest_free(allocator: PageAllocator, taken: set[int], size: int) -> int:
    best = run = 0
    for page in range(size):
        run = 0 if page in taken else run + 1
        best = max(best, run)
    return best


@given(st.data(), st.integers(1, 60))
def test_any_history(data: st.DataObject, size: int) -> None:
    allocator = PageAllocator(size)
    owners: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 30))):
        taken = {p for pages in owners for p in pages}
        action = data.draw(st.sampled_from(["new", "grow", "free"]))
        if action == "free" and owners:
            pages = owners.pop(data.draw(st.integers(0, len(owners) - 1)))
            allocator.free(data.draw(st.permutations(pages)))
        elif action == "grow" and owners and allocator.num_free:
            pages = data.draw(st.sampled_from(owners))
            new = allocator.allocate(1, pages[-1])
            assert new == [pages[-1] + 1] or pages[-1] + 1 in taken | {size}
            pages += new
        elif action == "new" and allocator.num_free:
            count = data.draw(st.integers(1, allocator.num_free))
            fits = longest_free(allocator, taken, size) >= count
            pages = allocator.allocate(count)
            assert len(pages) == count
            assert not fits or count_runs(pages) == 1
            owners.append(pages)
        everything = [p for pages in owners for p in pages]
        assert len(set(everything)) == len(everything)
        assert set(everything) <= set(range(size))
        assert allocator.num_free == size - len(everything)
    for pages in owners:
        allocator.free(pages)
    assert allocator.num_free == size
    assert allocator.allocate(size) == list(range(size))


def test_growing_sequences_keep_their_runs() -> None:
    allocator = PageAllocator(64)
    owners = [allocator.allocate(2) for _ in range(4)]
    for _ in range(6):
        for pages in owners:
            pages += allocator.allocate(1, pages[-1])
    assert [count_runs(pages) for pages in owners] == [1, 1, 1, 1]


def test_misuse_is_an_error() -> None:
    allocator = PageAllocator(4)
    pages = allocator.allocate(3)
    with pytest.raises(ValueError, match=r"^2 pages wanted, 1 free$"):
        allocator.allocate(2)
    allocator.free(pages)
    with pytest.raises(ValueError, match=r"^page 0 is freed twice$"):
        allocator.free([0])
    assert PageAllocator(0).num_free == 0
