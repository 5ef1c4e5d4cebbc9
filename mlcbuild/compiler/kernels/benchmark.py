"""What a kernel is measured on by ci/bench_kernels.py: each kernel's file says so in its own `list_benchmarks`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tvm import tirx

from mlcbuild.recipes.schema import Quantization

Unit = Literal["int8", "bfloat16", "float32"]  # as in peak.py
MOST_SEQUENCES = 64  # of one batch: attention and logits see no more rows


@dataclass(frozen=True, slots=True)
class Setting:
    """What benchmarks are made for: a model's shape, its quantization, and the CPU features that a target requires.

    `rows`: how many rows, or sequences, a kernel meets; `context`: earlier tokens of each sequence; `knobs`: those of a
    tuning, by kernel (see knobs.py).
    """

    hidden: int
    wide: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    quantization: Quantization
    requires: Collection[str]
    rows: tuple[int, ...]
    context: int
    knobs: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of every matrix of a decoder, as the kernels meet them, by name."""
        width = self.heads * self.head_dim
        return {
            "qkv": (width + 2 * self.kv_heads * self.head_dim, self.hidden),
            "o": (self.hidden, width),
            "gate_up": (2 * self.wide, self.hidden),
            "down": (self.hidden, self.wide),
            "logits": (self.vocab, self.hidden),
        }


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One kernel with everything that a call of it needs. Arguments are made from the buffers of its signature.

    `sizes` binds the symbolic sizes. `values` are those of arguments whose contents matter (indices, scalars); others
    are random. `streams` names the arguments that come from memory in practice: they rotate through more than the
    last-level cache, and their bytes are what a call reads. `nbytes` says so where that is not all of them, or where
    nothing streams: then the time is that of a hot cache. `operations` count against the peak of `unit`.
    """

    name: str
    kernel: tirx.PrimFunc
    sizes: Mapping[str, int]
    streams: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    nbytes: int | None = None
    operations: int = 0
    unit: Unit = "float32"


def list_linears(
    s: Setting,
    make: Callable[[int, int, bool], tirx.PrimFunc],
    get_sizes: Callable[[int, int], Mapping[str, int]],
    streams: tuple[str, ...],
    unit: Unit,
) -> Iterator[Benchmark]:
    """Every matrix of the model at every number of rows.

    `make(out_features, in_features, residual)` gives the kernel, `get_sizes(rows, in_features)` what its symbolic sizes
    are, `n` apart.
    """
    for name, (width, inner) in s.matrices.items():
        kernel = make(width, inner, name in ("o", "down"))
        for n in s.rows:
            if name != "logits" or n <= MOST_SEQUENCES:
                sizes = {"n": n, **get_sizes(n, inner)}
                operations = 2 * n * width * inner
                yield Benchmark(f"{name}, {n} rows", kernel, sizes, streams, operations=operations, unit=unit)
