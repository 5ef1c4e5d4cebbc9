"""bench: how fast a package runs on this machine, beside its memory, its multipliers and other programs.

    ./doit bench model=tiny                                                 # every case, within ten minutes
    ./doit bench model=llama3 source=random peer=llama.cpp minutes=30       # a large one: give it time
    ./doit bench model=tiny cases=decode*,prefill-512 rounds=9

Each round runs every case once on every program. Cases that the time does not allow are left out and named. What is
measured is written at once to artifacts/reports/bench-<package>.partial.json and .txt, and without `.partial` at the
end: a bench that is interrupted or killed leaves the partial ones, and the same command goes on from there. Peers that
the memory does not hold all at once are measured one after the other, each beside this engine.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlcbuild.errors import MlcbuildError
from mlcbuild.graph.plan import make_package_task

if TYPE_CHECKING:
    from engine.artifact import Package
    from engine.bench.cases import Case
    from engine.bench.peers import Program
    from engine.bench.speed import Show

VARIABLES = {
    "rounds": "rounds of every case, 5",
    "minutes": "that it may take, loading included, 10; fewer cases and rounds where they do not suffice",
    "cases": "which, as a comma list or globs: prefill-128, prefill-512, prefill-2048, decode-at-2000, decode, "
    "decode-batch-4, decode-batch-16, decode-batch-32; *",
    "peer": "programs to compare with, installed when needed: llama.cpp,openvino",
    "plot": "write a roofline plot, .svg or .png",
    "guesses": "guess so many tokens ahead, from the text and by draft=<model>; instead of all else",
    "busy": "see what is left while another program takes so many percent of a core, 1 to 100; instead of all else",
    "rows": "time steps of 1 to so many sequences, and mixed batches, instead of all else",
}
MEANINGLESS = {  # beside another
    "rows": ("minutes", "cases", "peer", "plot"),
    "guesses": ("minutes", "cases", "peer", "plot"),
    "busy": ("minutes", "peer", "plot"),
}
EVERY = 10.0  # seconds between lines of progress where there is no terminal


@dataclass(frozen=True)
class Wanted:
    """The variables, checked."""

    rounds: int
    minutes: float
    cases: list[Case]
    peers: list[str]
    plot: Path | None


def task_bench() -> dict[str, Any]:
    """measure a package's speed on this machine (peer=llama.cpp,openvino: beside others')"""
    return make_package_task(run_bench)


def run_bench(package: Path, variables: Mapping[str, str]) -> None:
    """Print the figures of one package and write artifacts/reports/bench-<package>.json."""
    from engine.artifact import open_package
    from engine.bench.peers import find_peer
    from engine.bench.record import get_partial, load_partial, make_identity, make_record
    from engine.bench.speed_report import print_report
    from mlcbuild.quality.speed import describe_machine

    wanted = make_wanted(variables)
    if "rows" in variables:
        print_curve(package, get_count(variables, "rows", 32), wanted.rounds)
        return
    if "busy" in variables:
        print_beside(package, get_count(variables, "busy", 50, most=100), wanted)
        return
    if "guesses" in variables:
        print_guessing(package, variables, wanted.rounds)
        return
    opened = open_package(package)
    config = opened.manifest.recipes["model"]["config"]
    programs = [find_peer(name, config, wanted.cases) for name in wanted.peers]
    record = make_record(opened.manifest.variant, describe_machine(), wanted.rounds, wanted.minutes, programs)
    same = {name: record[name] for name in ("machine", "peers", "rounds", "minutes")}
    record["identity"] = make_identity(package, {**same, "cases": [case.key for case in wanted.cases]})
    path = package.parents[1] / "reports" / f"bench-{package.name}.json"
    partial, root = get_partial(path), package.parents[2]
    if (earlier := load_partial(path, record["identity"])) is not None:
        record = earlier
        print(f"goes on from {len(record['turns'])} turns in {partial.relative_to(root)}; without it all starts anew")
    try:
        measure(opened, wanted, programs, record, path)
    finally:  # also when somebody ends it
        if record["complete"]:
            print_report(record)
            print(f"written to {path.relative_to(root)}")
        elif record["turns"] or record["overheads"]:
            print_report(record)
            print(f"PARTIAL: what was measured is in {partial.relative_to(root)}", flush=True)
    if wanted.plot is not None:
        print(f"plotted in {wanted.plot}")


def measure(package: Package, wanted: Wanted, programs: list[Program], record: dict[str, Any], path: Path) -> None:
    """All of it, into `record` and the file `path`; then the plot."""
    from engine.bench.pace import Pace
    from engine.bench.peers import group_programs
    from engine.bench.roofline import write_roofline
    from engine.bench.session import Session
    from engine.bench.speed_report import make_title
    from engine.machine import count_cores
    from engine.runtime.memory import count_bytes, get_free_memory
    from engine.runtime.tvm_executor import TvmExecutor
    from engine.text.tokenizer import load_tokenizer
    from mlcbuild.quality.roofline import make_roofline

    pace, free = Pace(60 * wanted.minutes), get_free_memory()
    with ExitStack() as stack:
        report = stack.enter_context(show_progress())
        executor = TvmExecutor(package)
        stack.callback(executor.close)
        own = count_bytes(package.manifest.library, executor.limits, executor.weight_bytes)
        groups = group_programs(programs, own, free)
        roofline = make_roofline(executor, package)
        session = Session(package.root, executor, roofline, wanted.cases, record, path, pace, report)
        session.measure_engine(load_tokenizer(package.root))
        speed = session.measure_programs(groups, count_cores())
        session.finish()
        if wanted.plot is not None:
            write_roofline(wanted.plot, make_title(record), speed, roofline, session.cases)


def make_wanted(variables: Mapping[str, str]) -> Wanted:
    """Raises MlcbuildError and InvalidSetting for what means nothing."""
    from engine.bench.cases import pick_cases
    from engine.bench.plot import check_plot

    for other, names in MEANINGLESS.items():
        if other in variables and (meaningless := [name for name in names if name in variables]):
            name = meaningless[0]
            raise MlcbuildError(f"{name}= means nothing with {other}=", hint=f"leave {name}= or {other}= out")
    plot = Path(variables["plot"]) if "plot" in variables else None
    if plot is not None:
        check_plot(plot)
    peers = list(dict.fromkeys(name.strip() for name in variables.get("peer", "").split(",") if name.strip()))
    cases, rounds = pick_cases(variables.get("cases", "*")), get_count(variables, "rounds", 5)
    return Wanted(rounds, get_minutes(variables), cases, peers, plot)


def get_minutes(variables: Mapping[str, str], default: float = 10) -> float:
    """A number above 0, with a fraction or without. MlcbuildError for anything else."""
    value = variables.get("minutes", str(default))
    try:
        minutes = float(value)
    except ValueError:
        minutes = math.nan
    if not (math.isfinite(minutes) and minutes > 0):
        raise MlcbuildError(f"minutes={value} is not a number above 0", hint=f"doit bench minutes={default:g}")
    return minutes


def get_count(variables: Mapping[str, str], name: str, default: int, most: int | None = None) -> int:
    """A positive number, `most` at most. MlcbuildError for anything else."""
    value = variables.get(name, str(default))
    if not value.isdigit() or int(value) < 1 or (most is not None and int(value) > most):
        wanted = "a positive number" if most is None else f"a number from 1 to {most}"
        raise MlcbuildError(f"{name}={value} is not {wanted}", hint=f"doit bench {name}={default}")
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


def print_beside(package: Path, percent: int, wanted: Wanted) -> None:
    """Tokens per second of each case alone, and while another program keeps a core busy."""
    from engine.artifact import open_package
    from engine.bench.busy import measure_beside
    from engine.bench.cases import explain_unfit
    from engine.runtime.tvm_executor import TvmExecutor

    with ExitStack() as stack:
        executor = TvmExecutor(open_package(package))
        stack.callback(executor.close)
        cases = [case for case in wanted.cases if not explain_unfit(case, executor.limits)]
        report = stack.enter_context(show_progress())
        found = measure_beside(executor, percent / 100, cases, wanted.rounds, report)
    print(f"{'tokens/s':24}{'alone':>10}{f'a core {percent} % busy':>22}{'kept':>8}")
    for f in found:
        print(f"{f.name:24}{f.alone:10.1f}{f.beside:22.1f}{f.kept:8.2f}")


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


@contextmanager
def show_progress() -> Iterator[Show]:
    """A context whose value is `report(text, fraction)`: a status line on a terminal, elsewhere a line now and then."""
    from rich.console import Console

    console, latest = Console(stderr=True), -math.inf

    def write(text: str, fraction: float | None = None) -> None:
        nonlocal latest
        if time.monotonic() - latest >= EVERY:
            latest = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    if not console.is_terminal:
        yield write
        return
    with console.status("load") as line:
        yield lambda text, fraction=None: line.update(text)
