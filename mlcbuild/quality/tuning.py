"""Which values of the kernels' knobs are fastest on this machine: ./doit tune.

A knob's values take turns, A B C A B C, on every matrix that feels it: one thread, its CPU time, weights from memory.
The order turns from round to round, since what follows the read kernel is slower for it. What counts is the ratio to
the current value within a round. A value is taken if the median of its ratios is better than the current value's by a
hundredth, and by more than three standard errors of that median, and once more in as many rounds of these two alone.
Then the knobs that share matrices with it have their turn again, once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlcbuild.compiler.kernels.benchmark import Benchmark
    from mlcbuild.compiler.kernels.knobs import Knob
    from mlcbuild.quality.kernels import Calls
    from mlcbuild.recipes.schema import Quantization, Target

LEAST = 0.01  # of the time: less is not worth another library
ERRORS = 3  # standard errors that count as noise
Values = dict[str, dict[str, int]]  # kernel -> knob -> value


@dataclass(frozen=True, slots=True)
class Ratio:
    """The time of a value divided by that of the current one: the median of the rounds, and its standard error."""

    median: float
    error: float

    @property
    def is_better(self) -> bool:
        """Whether the value is faster by more than the noise."""
        return 1 - self.median > max(LEAST, ERRORS * self.error)


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of a knob: each value's ratio, the share of the read roofline at the current one, and the choice."""

    kernel: str
    knob: str
    current: int
    ratios: Mapping[int, Ratio]
    of_read: float
    chosen: int
    confirmed: Ratio | None = None  # of the best value against the current one alone, where it looked better


@dataclass(frozen=True, slots=True)
class Case:
    """Calls of one matrix by the knob's value, how often a step makes them, what they read, and what they belong to:
    a quantization at so many rows."""

    calls: Mapping[int, Calls]
    count: int
    nbytes: int
    group: tuple[str, int]


@dataclass
class Tuner:
    """The search over the knobs of one target. `seconds` bound it; `left_out` names what they did not suffice for.

    `values` are those of the target's tuning at first, and what was chosen in the end; `config` is the shape.
    """

    target: Target
    config: Mapping[str, Any]
    quantizations: Sequence[Quantization]
    rounds: int
    seconds: float
    report: Callable[[str], None]
    values: Values = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        from mlcbuild.quality import kernels

        self.end = time.monotonic() + self.seconds
        self.values = {kernel: dict(values) for kernel, values in self.target.knobs.items()}
        self.cold = kernels.get_cold_bytes()
        self.read, self.read_bytes = kernels.make_limits(self.target, 1, self.cold, [])["read"]

    def run(self, wanted: Sequence[tuple[str, str]]) -> Iterator[Trial]:
        """Trials of (kernel, knob) pairs as they end; those that no matrix of the target feels are passed over."""
        pending, seen = list(wanted), dict[tuple[str, str], set[str]]()
        again: set[tuple[str, str]] = set()
        while pending:
            kernel, knob = pending.pop(0)
            felt = self.list_felt(kernel, knob)
            if not felt:
                continue
            if time.monotonic() > self.end:
                self.left_out += [f"{kernel}.{knob}"] if (kernel, knob) not in seen else []
                continue
            trial = self.try_knob(kernel, knob, felt)
            self.values.setdefault(kernel, {})[knob] = trial.chosen
            names = seen[kernel, knob] = {f"{quantization.name}: {b.name}" for quantization, _, b in felt}
            if trial.chosen != trial.current:
                others = [other for other in seen if other != (kernel, knob) and seen[other] & names]
                pending += [other for other in others if other not in again]
                again.update(others)
            yield trial

    def get_value(self, kernel: str, knob: str) -> int:
        """The current value of a knob."""
        return self.values.get(kernel, {}).get(knob, get_knob(kernel, knob).default)

    def list_felt(self, kernel: str, knob: str) -> list[tuple[Quantization, str, Benchmark]]:
        """The benchmarks, with quantization and kernel file, whose code depends on a knob, at the rows that feel it.

        Of two kernels for the same matrix it is the fused one, which is in another file.
        """
        from tvm_ffi import StructuralKey

        choices = get_knob(kernel, knob).choices
        found: list[tuple[Quantization, str, Benchmark]] = []
        for quantization in self.quantizations:
            ends = [self.list_benchmarks(kernel, knob, value, quantization) for value in (choices[0], choices[-1])]
            changed = {}
            for (file, one), (_, other) in zip(*ends, strict=True):
                name = one.name
                if StructuralKey(one.kernel) != StructuralKey(other.kernel) and (name not in changed or file != kernel):
                    changed[name] = (quantization, file, one)
            found += changed.values()
        return found

    def list_benchmarks(
        self, kernel: str, knob: str, value: int, quantization: Quantization
    ) -> list[tuple[str, Benchmark]]:
        """Those of all matmuls, with another value of one knob."""
        from mlcbuild.quality import kernels

        knobs = {**self.values, kernel: {**self.values.get(kernel, {}), knob: value}}
        rows = get_knob(kernel, knob).rows
        setting = kernels.make_setting(self.config, quantization, self.target, rows, knobs=knobs)
        return list(kernels.list_benchmarks(setting, "linear_*:*"))

    def try_knob(self, kernel: str, knob: str, felt: Sequence[tuple[Quantization, str, Benchmark]]) -> Trial:
        """Measure all values of a knob, and the best one again if it looks better than the current one."""
        current, name = self.get_value(kernel, knob), f"{kernel}.{knob}"
        cases = self.make_cases(kernel, knob, felt)
        ratios, of_read = self.measure(name, cases, get_knob(kernel, knob).choices, current)
        best = min(ratios, key=lambda value: ratios[value].median)
        confirmed = None
        if ratios[best].is_better:
            confirmed = self.measure(f"{name}, {best} again", cases, (current, best), current)[0][best]
        chosen = best if confirmed is not None and confirmed.is_better else current
        return Trial(kernel, knob, current, ratios, of_read, chosen, confirmed)

    def make_cases(self, kernel: str, knob: str, felt: Sequence[tuple[Quantization, str, Benchmark]]) -> list[Case]:
        """The matrices, compiled with each value; the values of one share its weights."""
        from mlcbuild.compiler.build import make_tvm_target
        from mlcbuild.quality import kernels

        cases, where, compiled = [], make_tvm_target(self.target), dict[Any, Any]()
        made = {
            q.name: {
                value: {(file, b.name): b for file, b in self.list_benchmarks(kernel, knob, value, q)}
                for value in get_knob(kernel, knob).choices
            }
            for q in {quantization.name: quantization for quantization, _, _ in felt}.values()
        }
        for quantization, file, benchmark in felt:
            self.report(f"{kernel}.{knob}: compile {quantization.name} {benchmark.name}")
            arguments, calls = kernels.make_arguments(benchmark, self.cold), {}
            for value, listed in made[quantization.name].items():
                one = listed[file, benchmark.name]
                calls[value] = kernels.Calls(compile_once(compiled, one.kernel, where), arguments)
            matrix, n = benchmark.name.split(",")[0], benchmark.sizes.get("n", benchmark.values.get("n"))
            count = 1 if matrix == "logits" else self.config["num_hidden_layers"]
            nbytes = kernels.count_bytes(benchmark, arguments[0])
            cases.append(Case(calls, count, nbytes, (quantization.name, int(n or 1))))
        return cases

    def measure(
        self, name: str, cases: Sequence[Case], choices: Sequence[int], current: int
    ) -> tuple[dict[int, Ratio], float]:
        """The ratio of each value to the current one, and the share of the read roofline at that."""
        clock, shares = time.thread_time, []
        found: dict[int, list[float]] = {value: [] for value in choices}
        for turn in range(self.rounds):
            self.report(f"{name}: round {turn + 1} of {self.rounds}")
            read = self.read.measure(clock) / self.read_bytes
            order = turned(choices, turn)
            seconds = [{value: case.calls[value].measure(clock) for value in order} for case in cases]
            shares.append(get_share(cases, [each[current] for each in seconds], read))
            for value in choices:
                found[value].append(compare(cases, seconds, value, current))
        return {value: make_ratio(ratios) for value, ratios in found.items()}, statistics.median(shares)


def get_knob(kernel: str, knob: str) -> Knob:
    """What a kernel declares of a knob."""
    from mlcbuild.compiler.kernels.knobs import load_knobs

    return load_knobs()[kernel][knob]


def compile_once(compiled: dict[Any, Any], kernel: Any, where: Any) -> Any:
    """The function of a PrimFunc; one that is the same in all of its structure is not compiled again."""
    from tvm_ffi import StructuralKey

    from mlcbuild.quality import kernels

    key = StructuralKey(kernel)
    if key not in compiled:
        compiled[key] = kernels.compile_kernels({"kernel": kernel}, where)["kernel"]
    return compiled[key]


def turned(choices: Sequence[int], turn: int) -> list[int]:
    """The order of a round: each value comes first, and after each other, as often as the next one."""
    at = turn // 2 % len(choices)
    order = [*choices[at:], *choices[:at]]
    return order if turn % 2 == 0 else order[::-1]


def compare(cases: Sequence[Case], seconds: Sequence[Mapping[int, float]], value: int, current: int) -> float:
    """The time of a value in a round divided by the current one's: the mean of the quantizations and rows."""
    groups: dict[tuple[str, int], list[float]] = {}
    for case, each in zip(cases, seconds, strict=True):
        total = groups.setdefault(case.group, [0.0, 0.0])
        total[0] += case.count * each[value]
        total[1] += case.count * each[current]
    return statistics.fmean(ours / theirs for ours, theirs in groups.values())


def get_share(cases: Sequence[Case], seconds: Sequence[float], read: float) -> float:
    """The time of reading the weights of all cases, `read` seconds a byte, divided by that of the calls."""
    spent = sum(case.count * each for case, each in zip(cases, seconds, strict=True))
    return sum(case.count * case.nbytes for case in cases) * read / spent


def make_ratio(ratios: Sequence[float]) -> Ratio:
    """The median and its standard error, from the median distance to it: rounds that were disturbed count little."""
    middle = statistics.median(ratios)
    spread = 1.4826 * statistics.median(abs(ratio - middle) for ratio in ratios)
    return Ratio(middle, 1.2533 * spread / len(ratios) ** 0.5)
