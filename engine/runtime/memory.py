"""How much of the machine's memory the KV cache gets: decided once, before it is allocated.

    mode            sequences at once        positions of all together
    local           4                        4 contexts, at most 8,192
    interactive     1                        1 context
    server          what the library takes   as many contexts

Always less than what fits: a fraction of the memory that is free, without the weights and the workspace of the kernels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from engine.artifact import Library
from engine.core import Limits
from engine.errors import DoesNotFit, InvalidSetting

Mode = Literal["local", "interactive", "server"]
MODES: tuple[str, ...] = get_args(Mode)
LOCAL_BATCH = 4
LOCAL_TOKENS = 8192
CONTEXT_AT_LEAST = 8192  # positions when nobody has set a budget
CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True)
class Budget:
    """What whoever starts the engine wants. `kv_tokens`: positions of the KV cache instead of those of `mode`.

    `memory_fraction`: of the free memory, what weights, workspace and KV cache may take together. Raises InvalidSetting
    for values that mean nothing.
    """

    mode: str = "local"
    kv_tokens: int | None = None
    memory_fraction: float = 0.85

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InvalidSetting(f"mode={self.mode}: there is no such mode", hint=f"give {', '.join(MODES)}")
        if not 0 < self.memory_fraction <= 1:
            raise InvalidSetting(
                f"memory_fraction={self.memory_fraction:g}: out of range", hint="give more than 0, at most 1"
            )
        if self.kv_tokens is not None and self.kv_tokens < 1:
            raise InvalidSetting(f"kv_tokens={self.kv_tokens}: out of range", hint="give 1 or more")


def make_library_limits(library: Library) -> Limits:
    """All that the library takes and one full context, at least 8,192 positions: for whoever drives an executor."""
    return _make_limits(library, library.limits.max_batch, max(library.limits.context_window, CONTEXT_AT_LEAST))


def make_limits(
    library: Library, weight_bytes: int, budget: Budget, free_bytes: int, *, draft: Library | None = None
) -> Limits:
    """Limits within `budget` on a machine with `free_bytes`. `weight_bytes` are those of `draft` too, if there is one.

    A draft model has a page for every page of the large one, and takes its batches.
    Raises DoesNotFit when what was asked for does not fit, or when not even one chunk of a prompt does.
    """
    both = (library,) if draft is None else (library, draft)
    fits = _count_fitting(both, weight_bytes, budget.memory_fraction, free_bytes)
    batch = _get_batch(library, budget.mode)
    most = budget.kv_tokens or _get_tokens(library, budget.mode)
    least = budget.kv_tokens or min(library.limits.prefill_chunk, most)
    if fits < least:
        raise _make_refusal(both, weight_bytes, budget, free_bytes, least, fits)
    limits = _make_limits(library, batch, most if budget.kv_tokens else min(most, fits))
    return replace(limits, prefill_chunk=min(one.limits.prefill_chunk for one in both))


def get_free_memory() -> int:
    """Bytes that this process could take: of the machine, and of its container if that has a limit."""
    return min([_get_machine_memory(), *_get_container_memory()])


def get_token_bytes(library: Library) -> int:
    """Bytes of one position of the KV cache: key and value, in all layers."""
    kv = library.kv
    return kv.layers * 2 * kv.kv_heads * kv.row_bytes


def count_bytes(library: Library, limits: Limits, weight_bytes: int) -> int:
    """Bytes that an executor of these limits takes: weights, workspace and KV cache."""
    cache = limits.num_pages * limits.page_size * get_token_bytes(library)
    return weight_bytes + _get_workspace([library]) + cache


def _get_batch(library: Library, mode: str) -> int:
    most = library.limits.max_batch
    return {"local": min(LOCAL_BATCH, most), "interactive": 1, "server": most}[mode]


def _get_tokens(library: Library, mode: str) -> int:
    tokens = _get_batch(library, mode) * library.limits.context_window
    return min(tokens, LOCAL_TOKENS) if mode == "local" else tokens


def _get_workspace(libraries: Sequence[Library]) -> int:
    """The greatest of all functions, twice: results of one call live while the next one runs. Of each model."""
    return sum(2 * max(library.memory.values(), default=0) for library in libraries)


def _count_fitting(libraries: Sequence[Library], weight_bytes: int, fraction: float, free_bytes: int) -> int:
    """Positions, whole pages, that fit beside weights and workspace."""
    left = int(free_bytes * fraction) - weight_bytes - _get_workspace(libraries)
    page = libraries[0].kv.page_size
    return max(0, left) // sum(map(get_token_bytes, libraries)) // page * page


def _make_limits(library: Library, batch: int, tokens: int) -> Limits:
    page = library.kv.page_size
    pages = -(-tokens // page)
    return Limits(
        context_window=min(library.limits.context_window, pages * page),
        prefill_chunk=library.limits.prefill_chunk,
        max_batch=batch,
        page_size=page,
        num_pages=pages,
        vocab_size=library.vocab_size,
    )


def _make_refusal(
    libraries: Sequence[Library], weight_bytes: int, budget: Budget, free_bytes: int, tokens: int, fits: int
) -> DoesNotFit:
    """What is missing, and the three settings that one could change, each with the value that it would need."""
    library = libraries[0]
    workspace, cache = _get_workspace(libraries), tokens * sum(map(get_token_bytes, libraries))
    needed = weight_bytes + workspace + cache
    fraction = -(-100 * needed // max(free_bytes, 1)) / 100
    smallest = min(MODES, key=lambda mode: _get_tokens(library, mode))
    most = _get_tokens(library, smallest)
    least = min(library.limits.prefill_chunk, most)
    allowed = int(free_bytes * budget.memory_fraction)
    hopeless = fits == 0 and fraction > 1
    return DoesNotFit(
        f"a KV cache of {tokens} tokens does not fit: weights {_show(weight_bytes)}, workspace {_show(workspace)} and "
        f"cache {_show(cache)} are {_show(needed)}, and {_show(allowed)} are allowed "
        f"(memory_fraction={budget.memory_fraction:g} of {_show(free_bytes)} free)",
        hint=f"{'free memory or take a smaller model: none is enough' if hopeless else 'change one'} of "
        f"kv_tokens={f'{fits} (all that fits)' if fits else '1 (not even that fits)'}, "
        f"memory_fraction={fraction:.2f} ({'enough for this' if fraction <= 1 else 'more than there is'}), "
        f"mode={smallest} without kv_tokens (needs {least} tokens or more, takes up to {most}"
        f"{'' if least <= fits else ': does not fit'})",
    )


def _show(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 1 << 30 else f"{nbytes / 2**20:.0f} MiB"


def _get_machine_memory() -> int:
    if MEMINFO.exists():
        return 1024 * _read_table(MEMINFO)["MemAvailable:"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _get_container_memory() -> list[int]:
    """What the limits of control groups (version 2, then 1) leave; cached files can be dropped, so they are free."""
    left = []
    for folder, limit, used, cached in (
        (CGROUP, "memory.max", "memory.current", "inactive_file"),
        (CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, now = ((folder / name).read_text().strip() for name in (limit, used))
            files = _read_table(folder / "memory.stat")[cached]
        except (OSError, KeyError):
            continue
        if most != "max":
            left.append(max(0, int(most) - int(now) + files))
    return left


def _read_table(path: Path) -> Mapping[str, int]:
    """Lines of a name and a number."""
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1}
