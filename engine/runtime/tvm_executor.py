"""The executor over a compiled package: weights mapped from disk, KV pages as one plain tensor, calls into TVM.

Everything here belongs to one thread: TVM keeps a pool of workers for each thread that launches a kernel. The CPU's
library takes the pages, the page table, positions and rows as arguments (see `kv.kind` "tensor" in library.json).
"""

from __future__ import annotations

import json
import math
import mmap
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from engine.artifact import Library, Package, load_weights_index, rebuild_command
from engine.core import Batch, Draw, Limits
from engine.errors import InvalidSetting, PackageInvalid
from engine.machine import count_cores
from engine.runtime.memory import Budget, get_free_memory, make_library_limits, make_limits
from engine.runtime.threads import Threads

HIDDEN, PICK = "batch_prefill_to_last_hidden_states", "pick_tokens"  # what packages that were made before them lack
HUGE_PAGE = 1 << 21
ALIGNMENT = 64
FAULT = 1 << 16  # bytes that Linux maps at once
SPINS = 20_000  # times that a worker without work yields before it sleeps: 7 ms, where TVM would burn 0.1 s
HELD_AS = {"bfloat16": "uint16"}  # what numpy has no name for


class TvmExecutor:
    """Runs batches on a CPU package; see engine.runtime.executor.Executor.

    `budget` decides what it may hold; None: all that the library takes, and pages for one full context (at least 8,192
    positions). `limits`, those of another executor, decide instead for a draft model; `draft` is counted in the budget
    of the model that it drafts for. Raises PackageInvalid for a library that is not what its manifest says or that this
    executor cannot drive, and DoesNotFit for a budget that this machine's memory does not allow.
    """

    def __init__(
        self,
        package: Package,
        budget: Budget | None = None,
        *,
        limits: Limits | None = None,
        draft: Package | None = None,
    ) -> None:
        os.environ.setdefault("TVM_NUM_THREADS", str(count_cores()))  # all read once; TVM alone would take half
        os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", str(SPINS))
        os.environ.setdefault("TVM_BIND_THREADS", "0")  # bound, they leave this process's affinity, and wait for a core
        library = package.manifest.library
        if library.kv.kind != "tensor":
            raise PackageInvalid(
                f"{package.root}: this engine runs CPU packages only, and this one is for {library.target['name']}",
                hint="build one for this machine: doit build target=cpu",
            )
        self._weights = _map_weights(package)  # first, since a thread then touches them
        from engine.runtime.tvm_runtime import get_wrap, limit_threads, load_library, make_list

        wrap = get_wrap()
        self._inputs = _Inputs(wrap)
        self._threads = Threads(_get_threads(), limit_threads)
        try:
            self._machine = load_library(package.library_path)
        except RuntimeError as error:
            what = str(error).rpartition(": ")[2].strip() or "no reason is given"
            raise PackageInvalid(
                f"{package.root}: {package.library_path.name} cannot be loaded: {what}",
                hint=f"rebuild the package: {rebuild_command(package.root, {'variant': package.manifest.variant})}",
            ) from None
        dtype = self._check_library(package, library)
        names = ["embed", "batch_prefill", "batch_decode", *{HIDDEN, PICK}.intersection(library.functions)]
        self._functions = {name: self._machine[name] for name in names}
        self._logits: Any = None  # of the latest run
        self._picked: list[int] = []  # the rows that tokens were picked from last
        self._params = make_list([wrap(self._weights[p.name]) for p in library.params])
        made = limits or self._make_limits(library, budget, draft)
        self.limits: Limits = replace(made, hidden_size=self._find_hidden_size(), picks_tokens=PICK in self._functions)
        kv = library.kv
        held = np.dtype(HELD_AS.get(dtype, dtype))
        shape = (kv.layers, self.limits.num_pages, 2, kv.kv_heads, kv.page_size, kv.row_bytes // held.itemsize)
        self._pages: NDArray[Any] | None = make_aligned(shape, held)
        self._kv = wrap(self._pages)

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """float32 [len(batch.logit_rows), vocab]; the array is the caller's to keep."""
        tokens = len(batch.tokens)
        self._logits = None  # so that their memory serves again
        embeds, *where = self._begin(batch)
        wanted = batch.logit_rows
        rows = len(wanted)
        if not rows:  # the kernels take at least one row
            wanted = np.zeros(1, np.int32)
        name = "batch_prefill"
        if len(wanted) == tokens:  # every one, since they rise
            name, wanted_too = "batch_decode", []
        else:
            wanted_too = [self._inputs.put("wanted", wanted)]
        with self._threads.share(name, tokens):
            logits, _ = self._functions[name](embeds, *wanted_too, *where, self._kv, self._params)
        self._logits = logits
        padded: Any = np.from_dlpack(logits)  # the same memory, which each call takes anew
        out: NDArray[np.float32] = padded[:rows, : self.limits.vocab_size]
        return out

    def pick_tokens(self, draws: Mapping[int, Draw]) -> list[int]:
        """By the library's own function."""
        picked = list(draws)
        rows, rows_tensor = self._inputs.take("picked", (len(draws),), np.int32)
        if picked != self._picked:  # seldom; a step has driven numpy's code for it out of the caches: 10 us
            rows[:] = self._picked = picked
        numbers, numbers_tensor = self._inputs.take("draws", (len(draws), len(Draw._fields)), np.float64)
        numbers[:] = list(draws.values())
        with self._threads.share(PICK, len(draws)):
            tokens: Any = self._functions[PICK](self._logits, rows_tensor, numbers_tensor)
        out: list[int] = np.from_dlpack(tokens).tolist()
        return out

    def run_hidden(self, batch: Batch) -> NDArray[np.float32]:
        """float32 [len(batch.tokens), hidden_size], which is the caller's to keep."""
        start = self._begin(batch)
        with self._threads.share(HIDDEN, len(batch.tokens)):
            states, _ = self._functions[HIDDEN](*start, self._kv, self._params)
        whole: Any = np.from_dlpack(states)
        out: NDArray[np.float32] = whole
        return out

    def copy_page(self, source: int, destination: int) -> None:
        """Copy one page of every layer."""
        assert self._pages is not None, "closed"
        self._pages[:, destination] = self._pages[:, source]

    def read_pages(self, pages: Sequence[int]) -> NDArray[Any]:
        """[layers, len(pages), 2, kv_heads, page_size, head_dim], or a little more for int8 codes with their scales."""
        assert self._pages is not None, "closed"
        return self._pages[:, np.asarray(pages, np.intp)]

    def write_pages(self, pages: Sequence[int], held: NDArray[Any]) -> None:
        """The counterpart of read_pages."""
        assert self._pages is not None, "closed"
        self._pages[:, np.asarray(pages, np.intp)] = held

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(a.nbytes for a in self._weights.values())

    def get_weight_bytes(self) -> list[NDArray[np.uint8]]:
        """Every weight as flat bytes, for benchmarks that read them."""
        return [a.reshape(-1).view(np.uint8) for a in self._weights.values()]

    def count_kernels(self, batch: Batch) -> dict[str, int]:
        """How often a run of the batch calls each kernel, most often first. Every later run is slower."""
        counts: Counter[str] = Counter()

        def note(_function: Any, name: str, before: bool, *_others: Any) -> int:
            if before and not name.startswith(("vm.builtin.", "shape_func")):
                counts[name] += 1
            return 0

        self._machine["set_instrument"](note)
        self.run(batch)
        return dict(counts.most_common())

    def close(self) -> None:
        """Release the weights and pages; the executor cannot be used afterwards."""
        self._functions, self._weights = {}, {}
        self._params = self._kv = self._pages = self._machine = self._logits = None

    def _make_limits(self, library: Library, budget: Budget | None, draft: Package | None) -> Limits:
        if budget is None:
            return make_library_limits(library)
        if draft is None:
            return make_limits(library, self.weight_bytes, budget, get_free_memory())
        beside = {param.name for param in draft.manifest.library.params}
        weights = sum(record.nbytes for record in load_weights_index(draft.root) if record.name in beside)
        both = self.weight_bytes + weights
        return make_limits(library, both, budget, get_free_memory(), draft=draft.manifest.library)

    def _begin(self, batch: Batch) -> list[Any]:
        """The arguments that every function starts with: embedded tokens, positions, rows and page table."""
        tokens = len(batch.tokens)
        if tokens > self.limits.prefill_chunk:
            raise ValueError(f"{tokens} tokens in one batch, and the library takes {self.limits.prefill_chunk}")
        put = self._inputs.put
        where = [put("positions", batch.positions), put("rows", batch.rows), put("table", batch.page_table)]
        return [self._functions["embed"](put("tokens", batch.tokens), self._params), *where]

    def _find_hidden_size(self) -> int:
        """As wide as an embedded token; 0 without the function that gives hidden states."""
        if HIDDEN not in self._functions:
            return 0
        first = self._inputs.put("tokens", np.zeros(1, np.int32))
        return int(self._functions["embed"](first, self._params).shape[1])

    def _check_library(self, package: Package, library: Library) -> str:
        """The library must describe itself as the manifest does: a mixed-up file would read wrong memory.

        Returns the dtype of its pages, which may be another one of the same size than in the package's first library.
        """
        own = json.loads(self._machine["_metadata"]())
        wanted = [[p.name, list(p.shape), p.dtype] for p in library.params]
        if own["abi"] != library.abi or [[p["name"], p["shape"], p["dtype"]] for p in own["params"]] != wanted:
            raise PackageInvalid(
                f"{package.root}: {package.library_path.name} is not the library that manifest.json describes",
                hint="rebuild the package: doit build model=... quantization=... target=...",
            )
        return str(own["kv"]["dtype"])


def _get_threads() -> int:
    """TVM_NUM_THREADS. Raises InvalidSetting unless it is a number above 0."""
    value = os.environ["TVM_NUM_THREADS"]
    if not value.isdigit() or int(value) < 1:
        raise InvalidSetting(f"TVM_NUM_THREADS={value} is not a number above 0", hint="unset it for all cores")
    return int(value)


class _Inputs:
    """Memory for the numbers of a call, by argument: written anew for each, and kept, since to make a tensor takes
    ten times as long. `wrap`: numpy's array as TVM's tensor."""

    def __init__(self, wrap: Callable[[NDArray[Any]], Any]) -> None:
        self._wrap = wrap
        self._held: dict[str, NDArray[Any]] = {}
        self._latest: dict[str, tuple[NDArray[Any], Any]] = {}  # as an array and as a tensor

    def put(self, name: str, values: NDArray[Any]) -> Any:
        """The values as a tensor, until the next of this name."""
        view, tensor = self.take(name, values.shape, values.dtype)
        view[...] = values
        return tensor

    def take(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> tuple[NDArray[Any], Any]:
        """Room for values as an array and as a tensor, until the next of this name, which has the same dtype."""
        latest = self._latest.get(name)
        if latest is not None and latest[0].shape == shape:
            return latest
        held, size = self._held.get(name), math.prod(shape)
        if held is None or held.size < size:
            room = np.empty(2 * size + ALIGNMENT, dtype)
            held = self._held[name] = room[-room.ctypes.data % ALIGNMENT // room.itemsize :]
        view = held[:size].reshape(shape)
        self._latest[name] = view, self._wrap(view)
        return self._latest[name]


def make_aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeroed memory on a 2 MiB boundary, in huge pages where the system gives them."""
    nbytes = math.prod(shape) * dtype.itemsize
    region = mmap.mmap(-1, nbytes + HUGE_PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    flat = np.frombuffer(region, np.uint8)
    start = -flat.ctypes.data % HUGE_PAGE
    return flat[start : start + nbytes].view(dtype).reshape(shape)


def _map_weights(package: Package) -> dict[str, NDArray[Any]]:
    """Every parameter as a view of its mapped shard; shapes and dtypes are checked against the library."""
    records = {r.name: r for r in load_weights_index(package.root)}
    shards: dict[Path, NDArray[np.uint8]] = {}
    out = {}
    for param in package.manifest.library.params:
        record = records.get(param.name)
        if record is None or record.shape != param.shape or record.dtype != param.dtype:
            found = "is missing" if record is None else f"is {record.dtype} {list(record.shape)}"
            raise PackageInvalid(
                f"{package.root}: weight {param.name} {found}, and the library wants {param.dtype} {list(param.shape)}",
                hint="rebuild the package: doit build model=... quantization=... target=...",
            )
        if record.shard not in shards:
            shards[record.shard] = _map_file(record.shard)
        data = shards[record.shard][record.offset : record.offset + record.nbytes]
        if data.ctypes.data % ALIGNMENT:
            raise PackageInvalid(f"{package.root}: weight {param.name} is not at a multiple of {ALIGNMENT} bytes")
        out[param.name] = data.view(param.dtype).reshape(param.shape)
    return out


def _map_file(path: Path) -> NDArray[np.uint8]:
    """The file as bytes, mapped copy-on-write: DLPack refuses read-only memory, and nothing writes to it."""
    with path.open("rb") as file:
        region = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    data = np.frombuffer(region, np.uint8)
    # Touched while the tokenizer loads, so that the first batch need not wait for the pages. max() lets Python's other
    # threads run; sum() would not, since it widens what it adds
    threading.Thread(target=data[::FAULT].max, name="touch", daemon=True).start()
    return data
