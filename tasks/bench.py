"""bench: how fast a package runs on this machine, beside its memory, its multipliers and other programs."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlcbuild.errors import MlcbuildError
from mlcbuild.graph.plan import make_package_task

if TYPE_CHECKING:
    from engine.artifact import Package
    from engine.bench.overhead import Overhead
    from engine.bench.peers import Peer
    from engine.bench.speed import Roofline, Speed
    from engine.bench.start import Start
    from engine.runtime.tvm_executor import TvmExecutor

FILE_WIDTH = 120  # columns of a table that no terminal shows
VARIABLES = {
    "rounds": "rounds of every case, 5",
    "peer": "programs to compare with, installed when needed: llama.cpp,openvino",
    "plot": "write a roofline plot, .svg or .png",
    "guesses": "guess so many tokens ahead, from the text and by draft=<model>; instead of all else",
    "rows": "time steps of 1 to so many sequences, and mixed batches, instead of all else",
}


def task_bench() -> dict[str, Any]:
    """measure a package's speed on this machine (peer=llama.cpp,openvino: beside others')"""
    return make_package_task(run_bench)


def run_bench(package: Path, variables: Mapping[str, str]) -> None:
    """Print the figures of one package and write artifacts/reports/bench-<package>.json."""
    from engine.artifact import open_package
    from engine.bench.cases import Case, make_batches, make_cases
    from engine.bench.overhead import measure_overhead
    from engine.bench.plot import check_plot
    from engine.bench.roofline import write_roofline
    from engine.bench.speed import measure_speed, to_record
    from engine.bench.start import measure_start
    from engine.runtime.tvm_executor import TvmExecutor
    from engine.text.tokenizer import load_tokenizer
    from mlcbuild.quality.speed import describe_machine

    rounds = get_count(variables, "rounds", 5)
    if "rows" in variables:
        print_curve(package, get_count(variables, "rows", 32), rounds)
        return
    if "guesses" in variables:
        print_guessing(package, variables, rounds)
        return
    plot = Path(variables["plot"]) if "plot" in variables else None
    if plot is not None:
        check_plot(plot)
    opened = open_package(package)
    recipes = opened.manifest.recipes
    with ExitStack() as stack:
        peers = load_peers(variables.get("peer", ""), recipes["model"]["config"], stack)
        executor = TvmExecutor(opened)
        stack.callback(executor.close)
        roofline = make_roofline(executor, opened)
        report = stack.enter_context(show_progress())
        speed = measure_speed(executor, rounds, roofline, report, peers)
        overheads = measure_overhead(executor, load_tokenizer(package), report)
        report("start")
        start = measure_start(package)
        kernels = executor.count_kernels(make_batches(Case("", 1, 1, 0), executor.limits)[0])
    record: dict[str, Any] = {"variant": opened.manifest.variant, "rounds": rounds, "machine": describe_machine()}
    record |= {"read_gb_per_s": (speed.read_rate or 0) / 1e9, "peak_gops": (speed.compute_rate or 0) / 1e9}
    record |= {"weight_bytes": roofline.weight_bytes, "peers": {name: peer.version for name, peer in peers.items()}}
    record |= {"figures": to_record(speed.figures), "overheads": [asdict(o) for o in overheads], "start": asdict(start)}
    record |= {"kernels": kernels}
    path = package.parents[1] / "reports" / f"bench-{package.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print_figures(record, speed)
    print_overheads(overheads, start)
    print(f"{sum(kernels.values())} kernels make a token: {', '.join(f'{n} {name}' for name, n in kernels.items())}")
    print(f"written to {path.relative_to(package.parents[2])}")
    if plot is not None:
        cases = make_cases(executor.limits)
        write_roofline(plot, make_title(record), speed, roofline, recipes["model"]["config"], cases)
        print(f"plotted in {plot}")


def get_count(variables: Mapping[str, str], name: str, default: int) -> int:
    """A positive number. MlcbuildError for anything else."""
    value = variables.get(name, str(default))
    if not value.isdigit() or int(value) < 1:
        raise MlcbuildError(f"{name}={value} is not a positive number", hint=f"doit bench {name}={default}")
    return int(value)


def print_curve(package: Path, most: int, rounds: int) -> None:
    """Milliseconds of each step, and how they compare with their neighbours'."""
    from engine.artifact import open_package
    from engine.bench.curve import measure_curve
    from engine.runtime.tvm_executor import TvmExecutor

    executor = TvmExecutor(open_package(package))
    with show_progress() as report:
        points = measure_curve(executor, most, rounds, report)
    executor.close()
    print(f"{'batch':28}{'ms':>9}{'ms/row':>9}{'beside neighbours':>20}")
    for p in points:
        print(f"{p.name:28}{p.milliseconds:9.2f}{p.milliseconds / p.rows:9.3f}{p.beside:20.2f}")


def print_guessing(package: Path, variables: Mapping[str, str], rounds: int) -> None:
    """Tokens of a step and the speed-up, by text and by who guesses."""
    from engine.artifact import open_package
    from engine.bench.guessing import measure_guessing
    from engine.runtime.memory import Budget
    from engine.runtime.pair import load_pair
    from engine.runtime.tvm_executor import TvmExecutor
    from engine.text.tokenizer import load_tokenizer

    opened, draft = open_package(package), variables.get("draft")
    with ExitStack() as stack:
        budget = Budget("interactive", 2048)
        if draft is None:
            executor, small = TvmExecutor(opened, budget), None
        else:
            executor, small = load_pair(opened, open_package(Path(draft)), budget)
            stack.callback(small.close)
        stack.callback(executor.close)
        report = stack.enter_context(show_progress())
        longest = get_count(variables, "guesses", 6)
        found = measure_guessing(executor, small, load_tokenizer(package), longest, rounds, report)
    print(f"{'text':8}{'guesses by':12}{'tokens/step':>12}{'speed-up':>10}{'right':>16}")
    for g in found:
        right = f"{g.right} of {g.guessed}" if g.guessed else ""
        print(f"{g.text:8}{g.way:12}{g.tokens_per_step:12.2f}{g.speedup:10.2f}{right:>16}")


def load_peers(names: str, config: Mapping[str, Any], stack: ExitStack) -> dict[str, Peer]:
    """The peers of a comma list, closed with the stack; their model files are temporary."""
    from tempfile import TemporaryDirectory

    from engine.bench.peers import load_peer
    from engine.machine import count_cores

    peers: dict[str, Peer] = {}
    for name in filter(None, names.split(",")):
        folder = stack.enter_context(TemporaryDirectory(prefix="mlcbuild-peer-"))
        peers[name] = load_peer(name, config, Path(folder), count_cores())
        stack.callback(peers[name].close)
    return peers


def make_roofline(executor: TvmExecutor, package: Package) -> Roofline:
    """Kernels for this target that read all weights, or multiply: int8 with VNNI, bfloat16 pairs, else float32."""
    import numpy as np
    import tvm

    from engine.bench.speed import Roofline
    from engine.machine import count_cores
    from engine.runtime.memory import get_token_bytes
    from engine.runtime.tvm_executor import make_aligned
    from mlcbuild.compiler.build import make_tvm_target
    from mlcbuild.compiler.kernels.benchmark import Unit
    from mlcbuild.compiler.kernels.linear_bf16 import is_chosen
    from mlcbuild.compiler.kernels.peak import OPERATIONS, make_peak
    from mlcbuild.compiler.kernels.read import make_read
    from mlcbuild.recipes.schema import Quantization, Target

    library, cores = package.manifest.library, count_cores()
    where = Target.model_validate(package.manifest.recipes["target"])
    quantization = Quantization.model_validate(package.manifest.recipes["quantization"])
    dtype: Unit = "bfloat16" if is_chosen(quantization, where.requires) else "float32"
    if library.layout == "int8-16x64" and "avx512_vnni" in where.requires:
        dtype = "int8"
    kernels = {"read": make_read(cores), "peak": make_peak(cores, dtype)}
    named = {name: kernel.with_attr("global_symbol", name) for name, kernel in kernels.items()}
    module = tvm.compile(tvm.IRModule(named), make_tvm_target(where))
    sums = tvm.runtime.from_dlpack(make_aligned((cores, 16), np.dtype("int32")))
    peaks = make_aligned((cores, 16), np.dtype("int32" if dtype == "int8" else "float32"))
    totals = tvm.runtime.from_dlpack(peaks)
    blobs = [tvm.runtime.from_dlpack(a) for a in executor.get_weight_bytes()]
    read_kernel, peak_kernel, steps = module["read"], module["peak"], 4_000_000

    def read() -> float:
        start = time.perf_counter()
        for blob in blobs:
            read_kernel(blob, sums)
        return time.perf_counter() - start

    def compute() -> float:
        start = time.perf_counter()
        peak_kernel(steps, totals)
        return time.perf_counter() - start

    operations = steps * OPERATIONS[dtype] * cores
    return Roofline(read, compute, executor.weight_bytes, get_token_bytes(library), operations)


@contextmanager
def show_progress() -> Any:
    """A context whose value is `report(text, fraction)`: a status line on a terminal, nothing elsewhere."""
    from rich.console import Console

    with Console(stderr=True).status("load") as line:
        yield lambda text, fraction=None: line.update(text)


def make_title(record: Mapping[str, Any]) -> str:
    """What was measured, where, and what the machine did meanwhile."""
    machine = record["machine"]
    limits = f"reads {record['read_gb_per_s']:.1f} GB/s, multiplies {record['peak_gops']:.0f} G operations/s"
    return f"{record['variant']} on {machine['cpu']}, {machine['threads']} threads ({limits})"


def print_figures(record: Mapping[str, Any], speed: Speed) -> None:
    """A table of the figures: tokens per second, the share of the read roofline, and every peer's with our ratio."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=make_title(record), title_justify="left")
    table.add_column("what", no_wrap=True)
    for name in ("tokens/s", "range", "of roofline", *record["peers"]):
        table.add_column(name, justify="right")
    for f in speed.figures:
        share = "" if f.roofline is None else f"{f.roofline:.2f}"
        theirs = [f"{p.rate:.1f}, {p.ratio:.2f} x" for p in f.peers.values()]
        table.add_row(f.name, f"{f.rate:.1f}", f"{f.slowest:.1f}-{f.fastest:.1f}", share, *theirs)
    for version in record["peers"].values():
        table.caption = f"{table.caption}; {version}" if table.caption else version
    console = Console()
    Console(width=console.width if console.is_terminal else FILE_WIDTH).print(table)


def print_overheads(overheads: Sequence[Overhead], start: Start) -> None:
    """What the engine adds to decode steps, and how it starts."""
    for o in overheads:
        share = f"{o.share:.1%} of a step, {o.milliseconds:.2f} ms"
        print(f"outside the model, batch {o.sequences}, {o.sampling}: {share}")
    peak, weights, kv = (n / 2**20 for n in (start.peak_bytes, start.weight_bytes, start.kv_bytes))
    print(f"from the start of Python to the first token of a 128-token prompt: {start.seconds:.2f} s; ", end="")
    print(f"peak memory {peak:.0f} MiB, weights {weights:.0f}, KV cache up to {kv:.0f}")
