"""A bench from its first measurement to its last: kept on disk after each, within its time, peers as memory allows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.bench.cases import Case, explain_unfit, make_batches
from engine.bench.overhead import BATCHES, guess_seconds, measure_overhead
from engine.bench.pace import Pace, describe
from engine.bench.peers import Peer, Program, make_folder
from engine.bench.record import get_partial, get_samples, write_whole
from engine.bench.speed import Roofline, Samples, Show, Speed, make_speed, measure_speed, to_record
from engine.bench.speed_report import make_text
from engine.bench.start import guess_start_seconds, measure_start
from engine.errors import InvalidSetting

if TYPE_CHECKING:
    from engine.runtime.tvm_executor import TvmExecutor
    from engine.text.tokenizer import Tokenizer

SMALL = 0.1  # of the time, what the engine's own figures may take each


@dataclass
class Session:
    """What measures `cases` on `executor`, the package in `package`.

    `record` is written to `path` when it is complete, before that where get_partial says; beside it as .txt. It may be
    what an earlier session has left: what it holds is not measured again.
    """

    package: Path
    executor: TvmExecutor
    roofline: Roofline
    cases: Sequence[Case]
    record: dict[str, Any]
    path: Path
    pace: Pace
    report: Show
    samples: Samples = field(init=False)

    def __post_init__(self) -> None:
        unfit = {case.name: explain_unfit(case, self.executor.limits) for case in self.cases}
        self.record["left_out"] = {name: why for name, why in unfit.items() if why}
        self.cases = [case for case in self.cases if not unfit[case.name]]
        if not self.cases:
            reasons = "; ".join(f"{name}: {why}" for name, why in unfit.items())
            raise InvalidSetting(f"no case is left: {reasons}", hint="give other cases=, or none for all that fit")
        self.samples = get_samples(self.record)

    def measure_engine(self, tokenizer: Tokenizer) -> None:
        """What the engine adds to steps, and how it starts: alone, before there are peers."""
        done = {overhead["sequences"] for overhead in self.record["overheads"]}
        for n in (n for n in BATCHES if n <= self.executor.limits.max_batch and n not in done):
            if self._has_time(f"outside the model, batch {n}", guess_seconds(self.executor, n)):
                found = measure_overhead(self.executor, tokenizer, self.report, [n])
                self.record["overheads"] += [asdict(overhead) for overhead in found]
                self.save()
        if self.record["start"] is None and self._has_time("start", guess_start_seconds(self.executor)):
            self.report("start")
            self.record["start"] = asdict(measure_start(self.package))
            self.save()

    def measure_programs(self, groups: Sequence[Sequence[Program]], threads: int) -> Speed:
        """The cases, on each group of programs after the other; each group has an equal part of the time."""
        for i, programs in enumerate(groups):
            pace = self.pace.split(len(groups) - i)
            beside = f" beside {', '.join(program.name for program in programs)}" if len(groups) > 1 else ""
            with ExitStack() as stack:
                peers = {program.name: self._load(program, threads, stack) for program in programs}
                measure_speed(
                    self.executor,
                    self.record["rounds"],
                    self.roofline,
                    self.report,
                    peers,
                    self.cases,
                    pace=pace,
                    samples=self.samples,
                    keep=partial(self._keep, pace, beside),
                )
            self.pace.lacking += pace.lacking
            self._keep(pace, beside)
        return make_speed(self.samples, self.cases, self.roofline)

    def finish(self) -> None:
        """Count kernels, which spoils the executor for timing, and say that this is all."""
        kernels = self.executor.count_kernels(make_batches(Case("", 1, 1, 0), self.executor.limits)[0])
        minutes = math.ceil(self.record["minutes"] + self.pace.lacking / 60) if self.pace.lacking else None
        self.record |= {"kernels": kernels, "complete": True, "minutes_for_all": minutes}
        self.save()

    def save(self) -> None:
        """Write the record and its table as they are now."""
        speed = make_speed(self.samples, self.cases, self.roofline)
        self.record |= {"read_gb_per_s": (speed.read_rate or 0) / 1e9, "peak_gops": (speed.compute_rate or 0) / 1e9}
        self.record |= {"figures": to_record(speed.figures), **asdict(self.samples)}
        half = get_partial(self.path)
        path = self.path if self.record["complete"] else half
        write_whole(path.with_suffix(".txt"), make_text(self.record))
        write_whole(path, json.dumps(self.record, indent=1) + "\n")
        if path != half:
            for old in (half, half.with_suffix(".txt")):
                old.unlink(missing_ok=True)

    def _keep(self, pace: Pace, beside: str) -> None:
        self.record["left_out"] |= {f"{name}{beside}": why for name, why in pace.left_out.items()}
        self.save()

    def _load(self, program: Program, threads: int, stack: ExitStack) -> Peer:
        self.report(f"load {program.name}, about {program.nbytes / 2**30:.1f} GiB")
        folder = stack.enter_context(make_folder(self.path.parents[1]))
        peer = program.load(folder, threads)
        stack.callback(peer.close)
        return peer

    def _has_time(self, name: str, seconds: float) -> bool:
        if seconds <= SMALL * self.pace.left:
            return True
        self.record["left_out"][name] = f"it takes about {describe(seconds)}, more than a tenth of the time"
        self.pace.lacking = max(self.pace.lacking, seconds / SMALL - self.pace.left)
        return False
