"""The prefix cache on disk: the next engine goes on where the last one ended; other packages' files are refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_engines import LIMITS, TOKENIZER, make_ending_model, make_request, run_all
from test_draft import make_draft_model
from test_prefix import check_books, play, traffic

from engine import cache_file
from engine.cache_file import CacheFile
from engine.core import Limits
from engine.engine import Engine
from engine.errors import InvalidSetting
from engine.runtime.fake import FakeExecutor
from engine.scheduler.blocks import PageAllocator
from engine.scheduler.prefix import PrefixCache

PROMPT = list(range(100))


def make_engine(file: CacheFile | None, limits: Limits = LIMITS, *, draft: bool = False) -> Engine:
    executor = FakeExecutor(limits, make_ending_model(limits.vocab_size))
    small = FakeExecutor(limits, make_draft_model(limits.vocab_size, 0.5)) if draft else None
    return Engine(executor, TOKENIZER, weigh_guesses=False, draft_tokens=4 * draft, draft=small, cache_file=file)


def ask(engine: Engine, prompt: list[int]) -> int:
    """How much of a prompt the cache has."""
    engine.add(make_request("a", prompt, max_tokens=3))
    return run_all(engine)["a"].usage.cached_tokens


@pytest.mark.parametrize("draft", [False, True])
def test_the_next_engine_goes_on(tmp_path: Path, draft: bool) -> None:
    """The executors are strict: pages that were not written, as those of a draft model would be, are an error."""
    file = CacheFile(tmp_path / "deep" / "cache", "tiny/q4 abc")
    first = make_engine(file, draft=draft)
    assert ask(first, PROMPT) == 0
    first.close()
    assert (tmp_path / "deep" / "cache").stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path / "deep") == ["cache"]
    second = make_engine(file, draft=draft)
    assert second.get_stats().free_pages == LIMITS.num_pages
    assert second.get_stats().cached_pages == 6
    check_books(second._scheduler)
    assert ask(second, PROMPT) == 96
    assert ask(second, [*PROMPT[:40], 7, 7]) == 32
    check_books(second._scheduler)
    second.close()
    second.close()


@given(traffic, traffic, st.integers(2, 20))
@settings(max_examples=30, deadline=None)
def test_nobody_can_tell(tmp_path_factory: pytest.TempPathFactory, before: list, after: list, num_pages: int) -> None:
    """What is restored into a smaller cache is a beginning of it; replies are those of an engine that starts cold."""
    file = CacheFile(tmp_path_factory.mktemp("cache") / "cache", "tiny/q4 abc")
    first = make_engine(file)
    play(first, before)
    first.close()
    small = Limits(96, 24, 4, 16, max(num_pages, 6), 258)
    second, cold = make_engine(file, small), make_engine(None, small)
    check_books(second._scheduler)
    found, wanted = play(second, after), play(cold, after)
    for name, output in found.items():
        if "abort" not in (output.finish_reason, wanted[name].finish_reason):
            assert (output.text, output.token_ids) == (wanted[name].text, wanted[name].token_ids)


def test_the_file_is_bounded(tmp_path: Path) -> None:
    """Of three texts, 18 pages of 128 bytes, those used last stay."""
    file = CacheFile(tmp_path / "cache", "tiny/q4 abc", most_bytes=8 * 128)
    first = make_engine(file)
    for start in (0, 50, 100):
        ask(first, [start + token for token in PROMPT])
    first.close()
    second = make_engine(file)
    assert second.get_stats().cached_pages == 8
    assert ask(second, [100 + token for token in PROMPT]) == 96
    assert ask(second, [50 + token for token in PROMPT]) == 32


def refuse(file: CacheFile) -> str:
    with pytest.raises(InvalidSetting) as caught:
        make_engine(file)
    return str(caught.value)


def test_what_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    hint = "\n  hint: name another file, or delete this one if it is not needed"
    engine = make_engine(CacheFile(path, "tiny/q4 abc"))
    ask(engine, PROMPT)
    engine.close()
    assert refuse(CacheFile(path, "tiny/q4 abd")) == f"cache_file={path}: it belongs to tiny/q4{hint}"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert refuse(CacheFile(path, "tiny/q4 abc")) == f"cache_file={path}: it is damaged{hint}"
    path.write_bytes(data[:-100])
    assert refuse(CacheFile(path, "tiny/q4 abc")).startswith(f"cache_file={path}: it cannot be read as a prefix cache")
    path.write_text("my novel")
    assert refuse(CacheFile(path, "tiny/q4 abc")).startswith(f"cache_file={path}: it cannot be read as a prefix cache")
    assert path.read_text() == "my novel"


def test_a_full_disk_costs_the_file_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = CacheFile(tmp_path / "cache", "tiny/q4 abc")
    engine = make_engine(file)
    ask(engine, PROMPT)
    engine.close()
    before = file.path.read_bytes()
    monkeypatch.setattr(cache_file, "save_file", fail)
    engine = make_engine(file)
    ask(engine, [9] * 50)
    engine.close()
    assert "No space left on device" in caplog.text
    assert file.path.read_bytes() == before
    assert os.listdir(tmp_path) == ["cache"]


def test_an_engine_that_has_died_writes_nothing(tmp_path: Path) -> None:
    def fail(history: object) -> None:
        raise RuntimeError("the machine is on fire")

    file = CacheFile(tmp_path / "cache", "tiny/q4 abc")
    engine = Engine(FakeExecutor(LIMITS, fail), TOKENIZER, cache_file=file)  # type: ignore[arg-type]
    engine.add(make_request("a", PROMPT))
    with pytest.raises(RuntimeError, match="on fire"):
        run_all(engine)
    engine.close()
    assert not file.path.exists()


def test_pages_in_use_come_first() -> None:
    allocator = PageAllocator(8)
    cache = PrefixCache(allocator, 1)
    nodes = []
    for token in range(4):  # two texts of two pages, of which the first is still read
        above = nodes[-1] if token % 2 else None
        node = cache.insert(above, [token], allocator.allocate(1)[0])
        assert node is not None
        nodes.append(node)
    cache.leave(nodes[2:])
    listed = cache.list_latest(3)
    assert [(node.key, parent) for node, parent in listed] == [((0,), -1), ((1,), 0), ((2,), -1)]
