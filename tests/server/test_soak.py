"""64 clients for a while: replies, streams, clients that leave, nonsense. Then nothing may be left of it.

    .venv/bin/python -m pytest tests/server/test_soak.py                                     # two minutes, as in CI
    MLCBUILD_SOAK_SECONDS=1800 MLCBUILD_SOAK_MODEL=tiny .venv/bin/python -m pytest tests/server/test_soak.py

The first takes the product with a fake model, the second `./doit serve model=tiny`, for half an hour. Both leave
artifacts/reports/soak-<model>.json with the figures and soak-<model>.log with a line every ten seconds and all that the
server said.

The seconds count from when the server is warm: its caches of grammars and of prompts have been full and forget. From
then on memory may grow by less than 1 MiB a minute. Ten minutes show that of the resident memory, certain to 95 %. In
two the allocators' own ups and downs hide it: what is looked at then is the memory in use, while all clients rest, of a
server that says so (see run_fake.py).

How long an answer may take is not set in seconds, which would be a test of the machine (TVM's threads wait for each
other, so that six busy programs on two cores slow tiny down from 600 tokens a second to 2): the engine must move on,
and no request may be passed over.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import httpx2
import pytest
from fake_models import ROOT
from running import start_process, wait_until
from soaking import BLOCKS, CHAT, STILL, Gate, Notes, Person, count_resident, measure_growth, read_cpu, read_gauges

from engine.sampling.grammar import CACHED

SECONDS = float(os.environ.get("MLCBUILD_SOAK_SECONDS", "100"))  # after the warm-up, SETTLING at least
ENOUGH = 600  # seconds, for resident memory to tell
MODEL = os.environ.get("MLCBUILD_SOAK_MODEL", "fake")
REPORTS = ROOT / "artifacts" / "reports"
CLIENTS = 64
LONGEST_WARM_UP = 600  # seconds
SETTLING = 60  # seconds at least to be warm: with its caches full, a server still gains 1 MiB in the next half minute
MOST_GROWTH = 1.0  # MiB a minute
MOST_TAKEN = 150  # MiB, by caches and allocators; the fake model settles at 60
MOST_IDLE = 0.01  # of one core
LINE = 10  # seconds from one line of the log to the next


@contextlib.contextmanager
def start_server(log: TextIO) -> Iterator[tuple[subprocess.Popen[str], str]]:
    pipes = {"stdout": subprocess.PIPE, "stderr": log}
    if MODEL == "fake":
        plain = {"PYTHONMALLOC": "malloc"}  # else its memory in use is not what glibc counts
        process = start_process("serve", "port=0", "max_queue=40", variables=plain, **pipes)
    else:
        doit, model = [sys.executable, "-m", "doit"], f"model={MODEL}"
        subprocess.run([*doit, "build", model], cwd=ROOT, check=True, **pipes | {"stdout": log})  # its words come now
        command = [*doit, "serve", model, "port=0", "max_queue=40"]
        process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)  # type: ignore[call-overload]
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if " is served at " in line)
        yield process, line.split(" is served at ")[1].split("/v1;")[0]
    finally:
        process.kill()
        process.communicate()


class Soak:
    """The clients at work, and what is watched meanwhile: memory, and that the engine moves on."""

    def __init__(self, url: str, process: subprocess.Popen[str], log: TextIO) -> None:
        self.notes = Notes()
        self.sizes: list[tuple[float, float]] = []  # minute, MiB; since the server is warm
        self.warm_up = 0.0  # seconds
        self.late = 0.0  # seconds by which this process itself was late at most
        self.in_use: list[tuple[float, float]] = []  # minute, MiB; at rest, if the server says it
        self._url, self._process, self._log = url, process, log
        self._gate = Gate()

    async def run(self) -> None:
        """Until the time is over. AssertionError when a client got what it should not, or waits in vain."""
        async with contextlib.AsyncExitStack() as stack:
            people = []
            for number in range(CLIENTS):
                # Each has connections of its own: one that leaves must not take another's with it.
                http = httpx2.AsyncClient(base_url=self._url, timeout=None, trust_env=False)
                person = Person(number, MODEL, await stack.enter_async_context(http), self.notes)
                people.append(asyncio.create_task(person.run(self._gate)))
            try:
                await self._watch(people)
                self._gate.go_on(end=True)
                await asyncio.wait_for(asyncio.gather(*people), SECONDS + STILL)
            finally:
                for person_task in people:
                    person_task.cancel()
                await asyncio.gather(*people, return_exceptions=True)

    async def _watch(self, people: list[asyncio.Task[None]]) -> None:
        start = moved = time.monotonic()
        warm, said, before = None, 0.0, -1.0
        while warm is None or time.monotonic() < warm + SECONDS:
            asked = time.monotonic()
            gauges = await asyncio.to_thread(read_gauges, self._url)
            await asyncio.sleep(1)
            now = time.monotonic()
            self.late = max(self.late, now - asked - 1)
            if warm is None and now - start >= SETTLING and is_warm(gauges):
                warm, self.warm_up = now, now - start
            if warm is not None and now - warm >= len(self.in_use) * SECONDS / BLOCKS:
                await self._look_at_rest((now - warm) / 60)
            assert warm is not None or now < start + LONGEST_WARM_UP, f"not warm after {LONGEST_WARM_UP} s: {gauges}"
            if warm is not None:
                self.sizes.append(((now - warm) / 60, count_resident(self._process.pid)))
            moved, before = (now, done) if (done := gauges["generation_tokens_total"]) > before else (moved, before)
            if now - said >= LINE:
                said = now
                self._say(now - start, gauges)
            trouble = self.notes.find_lost()
            if now - moved > STILL:
                trouble = f"no token for {now - moved:.0f} s"
            assert trouble is None, f"{trouble}; the engine: {gauges}; the machine's load: {os.getloadavg()}"
            if ended := [person for person in people if person.done()]:
                await asyncio.gather(*ended)  # raises what it stumbled over

    async def _look_at_rest(self, minute: float) -> None:
        if MODEL != "fake":
            return
        assert self._process.stdout is not None
        await asyncio.wait_for(self._gate.rest(CLIENTS), STILL)
        self._process.send_signal(signal.SIGUSR1)
        line = await asyncio.to_thread(self._process.stdout.readline)
        self.in_use.append((minute, int(line.removeprefix("in use: ")) / 2**20))
        self._gate.go_on()

    def _say(self, second: float, gauges: dict[str, float]) -> None:
        names = ("requests_running", "requests_waiting", "generation_tokens_total")
        line = {"second": round(second), "warm": bool(self.sizes), "mib": round(count_resident(self._process.pid), 1)}
        line |= {"load": os.getloadavg()[0], "answers": self.notes.answers, **{name: gauges[name] for name in names}}
        print(json.dumps(line), file=self._log, flush=True)


def is_warm(gauges: dict[str, float]) -> bool:
    """Every cache has been full: all grammars have been replaced once, and pages of prompts are being forgotten."""
    return gauges["grammar_compile_seconds_count"] > 2 * CACHED and gauges["prefix_cache_evictions_total"] > 0


def measure_idle(pid: int, seconds: float) -> float:
    """Cores that the process uses while nobody asks it anything."""
    begin, start = read_cpu(pid), time.monotonic()
    time.sleep(seconds)
    return (read_cpu(pid) - begin) / (time.monotonic() - start)


def check_end(process: subprocess.Popen[str], url: str, begin: dict[str, float]) -> float:
    """Pages, places, connections and threads are back; it still answers, and ends as told. The cores it uses idle."""
    files, threads = (Path(f"/proc/{process.pid}/{name}") for name in ("fd", "task"))
    for name in ("requests_running", "requests_waiting", "kv_cache_usage_ratio"):
        wait_until(lambda name=name: read_gauges(url)[name] == begin[name] == 0)
    wait_until(lambda: len(list(files.iterdir())) < 40)
    assert len(list(threads.iterdir())) < 80
    idle = min(measure_idle(process.pid, 3) for _ in range(2))
    hi = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    assert httpx2.post(url + CHAT, json=hi, timeout=STILL, trust_env=False).status_code == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(STILL) == 0
    return idle


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.timeout(2 * SECONDS + LONGEST_WARM_UP + 300)
def test_soak() -> None:
    REPORTS.mkdir(parents=True, exist_ok=True)
    path = REPORTS / f"soak-{MODEL}.log"
    with path.open("w") as log, start_server(log) as (process, url):
        first, cpu = count_resident(process.pid), read_cpu(process.pid)
        begin, said, start = read_gauges(url), path.read_text(), time.monotonic()  # said: what was built
        soak = Soak(url, process, log)
        asyncio.run(soak.run())
        cores = (read_cpu(process.pid) - cpu) / (time.monotonic() - start)
        idle = check_end(process, url, begin)
    growth, most = measure_growth(soak.sizes), max(size for _, size in soak.sizes)
    report: dict[str, Any] = {"model": MODEL, "clients": CLIENTS, "seconds": SECONDS, "warm_up_seconds": soak.warm_up}
    report |= {"answers": dict(soak.notes.seen), "times_seconds": soak.notes.summarize_times()}
    report |= {"mib": {"at_first": first, "warm": growth.first, "at_last": growth.last, "most": most}}
    report |= {"growth_mib_per_minute": growth.slope, "growth_at_most_95": growth.at_most, "idle_cores": idle}
    report |= {"server_cores": cores, "machine": platform.processor() or platform.machine(), "cpus": os.cpu_count()}
    if MODEL == "fake":
        in_use = measure_growth(soak.in_use)
        report |= {"in_use_mib": [round(mib, 2) for _, mib in soak.in_use]}
        report |= {"in_use_growth": in_use.slope, "in_use_growth_at_most_95": in_use.at_most}
    report |= {"load": os.getloadavg(), "late_seconds": soak.late}
    report |= {"mib_by_second": [round(size, 1) for _, size in soak.sizes]}
    path.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{json.dumps(report)}")
    assert [line for line in path.read_text().removeprefix(said).splitlines() if not line.startswith("{")] == []
    assert min(soak.notes.seen[name] for name in ("200", "400", "429", "left", "left a stream", "left a body")) > 0
    assert idle < MOST_IDLE
    assert most - first < MOST_TAKEN
    if MODEL == "fake":
        assert in_use.at_most < MOST_GROWTH, soak.in_use
    assert SECONDS < ENOUGH or growth.at_most < MOST_GROWTH


def test_growth_is_seen_in_noise() -> None:
    draw = random.Random(0)
    seconds = range(120)
    for slope in (0.0, 2.0):
        found = measure_growth([(s / 60, 300 + slope * s / 60 + draw.gauss(0, 1)) for s in seconds])
        assert found.slope == pytest.approx(slope, abs=0.5)
        assert (found.at_most < MOST_GROWTH) == (slope == 0.0)


def test_one_that_is_passed_over_is_found() -> None:
    notes = Notes()
    with notes.wait(1, "reply"):
        assert notes.find_lost() is None
        notes.answers += 1001
        assert "1001 later requests have been answered" in str(notes.find_lost())
    assert notes.find_lost() is None
