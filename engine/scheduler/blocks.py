"""Who owns which page of the KV cache. Hands out runs of consecutive pages: attention reads those faster.

Free pages are kept as maximal runs. A sequence that grows gets the page after its last one if that is free. A new
place is taken from the largest run, in its middle when something lies before it: what lies before may want to grow.
"""

from __future__ import annotations

from collections.abc import Iterable


class PageAllocator:
    """`num_pages` pages, all free at first."""

    def __init__(self, num_pages: int) -> None:
        self._starts = {0: num_pages} if num_pages else {}  # first page of each free run -> its length
        self._ends = {num_pages: 0} if num_pages else {}  # page after each free run -> its first page
        self._used = bytearray(num_pages)
        self.num_free = num_pages

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """`count` pages; the first follows page `after` if possible. The caller has looked at `num_free`."""
        if count > self.num_free:
            raise ValueError(f"{count} pages wanted, {self.num_free} free")
        pages: list[int] = []
        if after is not None and count and after + 1 in self._starts:
            pages += self._take(after + 1, min(count, self._starts[after + 1]))
        while len(pages) < count:
            start, length = max(self._starts.items(), key=lambda run: run[1])
            wanted = min(count - len(pages), length)
            pages += self._take(start + (length - wanted) // 2 if start else 0, wanted)
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Take back pages of one owner, in any order. ValueError for a page that is not in use."""
        for page in pages:
            if not self._used[page]:
                raise ValueError(f"page {page} is freed twice")
            self._used[page] = 0
            self.num_free += 1
            start = self._ends.pop(page, page)  # the run that ends here, if any
            end = page + 1 + self._starts.pop(page + 1, 0)  # and the run that begins after
            self._starts[start] = end - start
            self._ends[end] = start

    def _take(self, first: int, count: int) -> list[int]:
        """Cut pages [first, first + count) out of the free run that holds them."""
        start = first if first in self._starts else max(s for s in self._starts if s < first)
        end = start + self._starts.pop(start)
        del self._ends[end]
        for left, right in ((start, first), (first + count, end)):
            if left < right:
                self._starts[left] = right - left
                self._ends[right] = left
        pages = list(range(first, first + count))
        for page in pages:
            self._used[page] = 1
        self.num_free -= count
        return pages
