"""What the KV cache gets of the machine's memory, in each mode, and how a wish that does not fit is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from engine.artifact import KvShape, Library, LibraryLimits
from engine.core import Limits
from engine.errors import DoesNotFit, InvalidSetting
from engine.runtime import memory
from engine.runtime.memory import Budget, get_free_memory, get_token_bytes, make_library_limits, make_limits

GIB = 1 << 30
WEIGHTS = 700 << 20
LLAMA = Library(  # 64 KiB for each position
    abi=1,
    family="llama",
    quantization="q4f16_1",
    layout="rows16",
    target=MappingProxyType({"name": "x86-64-v4"}),
    requires=(),
    tvm="0",
    functions=(),
    params=(),
    limits=LibraryLimits(context_window=131072, prefill_chunk=512, max_batch=32),
    vocab_size=128256,
    kv=KvShape("tensor", "float16", layers=16, kv_heads=8, page_size=16, head_dim=128),
    memory=MappingProxyType({"batch_prefill": 300 << 20, "embed": 4 << 20}),
)
TINY = replace(LLAMA, limits=LibraryLimits(context_window=1024, prefill_chunk=256, max_batch=32))


def get_sizes(limits: Limits) -> tuple[int, int, int]:
    return limits.max_batch, limits.num_pages * limits.page_size, limits.context_window


@pytest.mark.parametrize(
    ("library", "mode", "free", "sizes"),
    [
        (LLAMA, "local", 64, (4, 8192, 8192)),
        (LLAMA, "interactive", 64, (1, 131072, 131072)),
        (LLAMA, "server", 64, (32, 870480, 131072)),
        (LLAMA, "server", 1024, (32, 32 * 131072, 131072)),
        (LLAMA, "interactive", 8, (1, 90608, 90608)),
        (LLAMA, "local", 1.75, (4, 3568, 3568)),
        (TINY, "local", 64, (4, 4096, 1024)),
        (TINY, "interactive", 64, (1, 1024, 1024)),
        (TINY, "server", 64, (32, 32768, 1024)),
    ],
)
def test_modes(library: Library, mode: str, free: float, sizes: tuple[int, int, int]) -> None:
    assert get_sizes(make_limits(library, WEIGHTS, Budget(mode), int(free * GIB))) == sizes


def test_everything_stays_within_the_budget() -> None:
    for free in range(2, 40):
        for mode in memory.MODES:
            limits = make_limits(LLAMA, WEIGHTS, Budget(mode), free * GIB)
            cache = limits.num_pages * limits.page_size * get_token_bytes(LLAMA)
            assert cache + WEIGHTS + 2 * (300 << 20) <= 0.85 * free * GIB


def test_a_draft_model_is_within_the_budget() -> None:
    """A page of each under every number; a quarter of the layers, and a smaller chunk."""
    small = replace(LLAMA, kv=replace(LLAMA.kv, layers=4), memory=MappingProxyType({"embed": 10 << 20}))
    small = replace(small, limits=replace(small.limits, prefill_chunk=256))
    limits = make_limits(LLAMA, WEIGHTS, Budget("server"), 8 * GIB, draft=small)
    taken = limits.num_pages * limits.page_size * (get_token_bytes(LLAMA) + get_token_bytes(small))
    most = int(0.85 * 8 * GIB)
    assert most - (80 << 10) * 16 < taken + WEIGHTS + 2 * (310 << 20) <= most
    assert limits.prefill_chunk == 256
    with pytest.raises(DoesNotFit, match="weights 700 MiB, workspace 620 MiB and cache 7.63 GiB are 8.92 GiB"):
        make_limits(LLAMA, WEIGHTS, Budget("server", 100_000), 8 * GIB, draft=small)


def test_int8_pages_hold_nearly_twice_as_many_tokens() -> None:
    codes = replace(LLAMA, kv=replace(LLAMA.kv, dtype="int8"))
    assert (get_token_bytes(LLAMA), get_token_bytes(codes)) == (16 * 2 * 8 * 128 * 2, 16 * 2 * 8 * (128 + 4))
    floats, bytes_ = (get_sizes(make_limits(one, WEIGHTS, Budget("server"), 8 * GIB))[1] for one in (LLAMA, codes))
    assert (floats, bytes_) == (90608, 175728)


def test_tokens_that_are_asked_for() -> None:
    limits = make_limits(LLAMA, WEIGHTS, Budget("local", 20000), 64 * GIB)
    assert get_sizes(limits) == (4, 20000, 20000)
    assert get_sizes(make_limits(LLAMA, WEIGHTS, Budget("server", 20001), 64 * GIB)) == (32, 20016, 20016)
    assert get_sizes(make_limits(LLAMA, WEIGHTS, Budget("local", 70000, 1.0), 8 * GIB))[1] == 70000
    assert get_sizes(make_library_limits(TINY)) == (32, 8192, 1024)


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(DoesNotFit) as caught:
        make_limits(LLAMA, WEIGHTS, Budget("server", 100_000), 8 * GIB)
    assert str(caught.value) == (
        "a KV cache of 100000 tokens does not fit: weights 700 MiB, workspace 600 MiB and cache 6.10 GiB are "
        "7.37 GiB, and 6.80 GiB are allowed (memory_fraction=0.85 of 8.00 GiB free)\n"
        "  hint: change one of kv_tokens=90608 (all that fits), memory_fraction=0.93 (enough for this), "
        "mode=local without kv_tokens (needs 512 tokens or more, takes up to 8192)"
    )
    assert get_sizes(make_limits(LLAMA, WEIGHTS, Budget("server", 90608), 8 * GIB))[1] == 90608
    assert get_sizes(make_limits(LLAMA, WEIGHTS, Budget("server", 100_000, 0.93), 8 * GIB))[1] == 100_000


def test_a_machine_that_is_too_small_is_told_so() -> None:
    with pytest.raises(DoesNotFit) as caught:
        make_limits(LLAMA, WEIGHTS, Budget("interactive"), GIB)
    assert str(caught.value) == (
        "a KV cache of 512 tokens does not fit: weights 700 MiB, workspace 600 MiB and cache 32 MiB are 1.30 GiB, "
        "and 870 MiB are allowed (memory_fraction=0.85 of 1.00 GiB free)\n"
        "  hint: free memory or take a smaller model: none is enough of kv_tokens=1 (not even that fits), "
        "memory_fraction=1.31 (more than there is), "
        "mode=local without kv_tokens (needs 512 tokens or more, takes up to 8192: does not fit)"
    )


@pytest.mark.parametrize("mode", memory.MODES)
def test_what_a_refusal_names_is_enough(mode: str) -> None:
    """In every mode, with and without a wish for tokens: each value that it names, and nothing that it rules out."""
    for free, wish in ((1.61, None), (1.55, None), (1.25, None), (3, 100_000)):

        def fit(mode: str, tokens: int | None, fraction: float, nbytes: int = int(free * GIB)) -> bool:
            try:
                return bool(make_limits(LLAMA, WEIGHTS, Budget(mode, tokens, fraction), nbytes))
            except DoesNotFit:
                return False

        with pytest.raises(DoesNotFit) as caught:
            make_limits(LLAMA, WEIGHTS, Budget(mode, wish, 0.8), int(free * GIB))
        named = re.search(
            r"kv_tokens=(\d+) \((.*?)\), memory_fraction=(\d\.\d\d) \((.*?)\), mode=(\w+) .*?(: does not fit)?\)$",
            caught.value.hint,
        )
        assert named is not None
        tokens, about_tokens, fraction, about_fraction, other, about_mode = named.groups()
        assert fit(mode, int(tokens), 0.8) == (about_tokens == "all that fits")
        assert not fit(mode, int(tokens) + 16, 0.8)
        assert (float(fraction) <= 1 and fit(mode, wish, float(fraction))) == (about_fraction == "enough for this")
        assert fit(other, None, 0.8) == (about_mode is None)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"mode": "big"}, "mode=big: there is no such mode\n  hint: give local, interactive, server"),
        ({"memory_fraction": 1.5}, "memory_fraction=1.5: out of range\n  hint: give more than 0, at most 1"),
        ({"kv_tokens": 0}, "kv_tokens=0: out of range\n  hint: give 1 or more"),
    ],
)
def test_settings_that_mean_nothing(values: dict, text: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        Budget(**values)
    assert str(caught.value) == text


def test_free_memory_is_that_of_the_machine_or_of_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert get_free_memory() > 1 << 20
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:    5000 kB\nHugePages_Total:       0\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert get_free_memory() == 5000 << 10
    for name, text in (("max", "4096000\n"), ("current", "3000000\n"), ("stat", "anon 1\ninactive_file 1000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert get_free_memory() == 1097000
    (tmp_path / "memory.max").write_text("max\n")
    assert get_free_memory() == 5000 << 10
    folder = tmp_path / "memory"
    folder.mkdir()
    for name, text in (("limit_in_bytes", "2000"), ("usage_in_bytes", "1500"), ("stat", "total_inactive_file 7")):
        (folder / f"memory.{name}").write_text(text)
    assert get_free_memory() == 507
