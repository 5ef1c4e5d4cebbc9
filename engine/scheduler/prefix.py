"""The prefix cache: a radix tree over token ids that remembers which pages hold which beginnings.

A node stands for one full page: its edge is the page's tokens, and the way to it from the root is everything that the
page's keys and values depend on. So a prompt that begins as an earlier text did reads that text's pages instead of
computing them. Pages in the tree are never written again. Sequences that read a page are counted on it; a page that
nobody reads stays until the allocator runs dry, and the one that was left the longest ago goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from engine.scheduler.blocks import PageAllocator


class Node:
    """One full page. `readers`: sequences that hold it; who holds a node also holds all nodes above it."""

    __slots__ = ("children", "key", "page", "parent", "readers")

    def __init__(self, key: tuple[int, ...], page: int, parent: Node | None) -> None:
        self.key = key
        self.page = page
        self.parent = parent
        self.readers = 0
        self.children: dict[tuple[int, ...], Node] = {}


class PrefixCache:
    """Shares pages of `allocator`. Where it is not `enabled` nothing is to be put in, so that nothing is ever found."""

    def __init__(self, allocator: PageAllocator, page_size: int, *, enabled: bool = True) -> None:
        self._allocator = allocator
        self._page_size = page_size
        self.enabled = enabled
        self._root = Node((), -1, None)
        # Nobody reads these; first the one that was left the longest ago. Always children before their parents: a
        # sequence leaves its deepest page first, and it cannot come back to a page without its parents.
        self._unread: OrderedDict[Node, None] = OrderedDict()
        self.evictions = 0

    @property
    def num_unread(self) -> int:
        """Pages that are kept for later only: they can be had by `evict`."""
        return len(self._unread)

    def find(self, tokens: Sequence[int], limit: int) -> list[Node]:
        """The longest known beginning of the first `limit` tokens, as nodes from the root on; nobody is counted yet."""
        size, node, found = self._page_size, self._root, list[Node]()
        for end in range(size, limit + 1, size):
            child = node.children.get(tuple(tokens[end - size : end]))
            if child is None:
                break
            found.append(child)
            node = child
        return found

    def hold(self, nodes: Sequence[Node]) -> None:
        """Count one more reader on each; `nodes` is a way from the root, or goes on from one that the reader holds."""
        for node in nodes:
            if not node.readers:
                del self._unread[node]
            node.readers += 1

    def leave(self, nodes: Sequence[Node]) -> None:
        """Count one reader less on each of a way from the root."""
        for node in reversed(nodes):
            node.readers -= 1
            if not node.readers:
                self._unread[node] = None

    def insert(self, above: Node | None, tokens: Sequence[int], page: int) -> Node:
        """Remember that `page` holds `tokens` after `above` (None: at the beginning), and hold it for its owner.

        When another page holds the same already, `page` is freed and the owner must read the other one.
        """
        parent, key = above or self._root, tuple(tokens)
        node = parent.children.get(key)
        if node is None:
            node = parent.children[key] = Node(key, page, parent)
            node.readers = 1
        else:
            self._allocator.free([page])
            self.hold([node])
        return node

    def list_latest(self, limit: int) -> list[tuple[Node, int]]:
        """Up to `limit` pages, those used last first, each with the place in this list of the one before it, or -1.

        Every page comes after the one before it.
        """
        places: dict[Node, int] = {self._root: -1}
        found: list[tuple[Node, int]] = []
        for node in (*self._walk_read(), *reversed(self._unread)):
            if len(found) == limit:
                break
            assert node.parent is not None
            found.append((node, places[node.parent]))
            places[node] = len(found) - 1
        return found

    def restore(self, keys: Sequence[Sequence[int]], parents: Sequence[int]) -> list[int]:
        """Remember pages as `list_latest` gave them, as many as are free; the pages to fill, in that order.

        For a cache that has nothing yet.
        """
        pages = self._allocator.allocate(min(len(keys), self._allocator.num_free))
        nodes: list[Node] = []
        for page, key, parent in zip(pages, keys, parents, strict=False):
            above = nodes[parent] if parent >= 0 else self._root
            node = above.children[tuple(key)] = Node(tuple(key), page, above)
            nodes.append(node)
        self._unread.update(dict.fromkeys(reversed(nodes)))
        return pages

    def _walk_read(self) -> list[Node]:
        """The pages that somebody reads, each after its parent."""
        found = [node for node in self._root.children.values() if node.readers]
        for node in found:  # which grows meanwhile
            found += [child for child in node.children.values() if child.readers]
        return found

    def evict(self, count: int) -> None:
        """Forget `count` pages that nobody reads and free them. The caller has looked at `num_unread`."""
        for _ in range(count):
            node, _none = self._unread.popitem(last=False)
            assert node.parent is not None
            assert not node.children, "a page is forgotten before one that needs it"
            del node.parent.children[node.key]
            self._allocator.free([node.page])
        self.evictions += count
