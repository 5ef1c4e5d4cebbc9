"""How long a package takes from a process's start to its first token, and the memory it takes: each in a new process.

`python -m engine.bench.start FOLDER` is that process; it prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.runtime.executor import Executor

PROMPT = 128  # tokens
ROUNDS = 3
IMPORTS = 1.0  # seconds before the prompt, at most


@dataclass(frozen=True, slots=True)
class Start:
    """Medians. `seconds` from the start of Python to the first token, files in the page cache; `peak_bytes` of memory,
    of which `weight_bytes` are mapped from the package and at most `kv_bytes` hold keys and values."""

    seconds: float
    peak_bytes: int
    weight_bytes: int
    kv_bytes: int


def measure_start(package: Path, rounds: int = ROUNDS) -> Start:
    """Start the package so often, after once to warm the page cache. Raises CalledProcessError when it does not run."""
    import statistics
    import subprocess  # not by the process that is measured

    found: list[Start] = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        command = [sys.executable, "-m", "engine.bench.start", str(package)]
        root = str(Path(__file__).parents[2])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.getenv("PYTHONPATH")])])}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                line = process.stdout.readline()
                seconds = time.perf_counter() - start  # to give the memory back takes longer
            except BaseException:  # whoever ends us leaves nothing running
                process.kill()
                raise
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        found.append(Start(seconds, **json.loads(line)))
    del found[0]
    middle = sorted(found, key=lambda one: one.peak_bytes)[len(found) // 2]
    seconds = statistics.median(one.seconds for one in found)
    return Start(seconds, middle.peak_bytes, middle.weight_bytes, middle.kv_bytes)


def guess_start_seconds(executor: Executor, rounds: int = ROUNDS) -> float:
    """How long `measure_start` will take, from one prompt."""
    from engine.bench.cases import Case, make_batches

    case = Case("", 1, min(PROMPT, executor.limits.max_length - 1), 0)
    start = time.perf_counter()
    for batch in make_batches(case, executor.limits):
        executor.run(batch)
    return (rounds + 1) * (IMPORTS + time.perf_counter() - start)


def main() -> None:
    """Load the package as `engine.LLM` does, make one token, and end."""
    from engine.artifact import load_weights_index, open_package
    from engine.core import SamplingParams
    from engine.llm import LLM
    from engine.runtime.memory import get_token_bytes

    folder = Path(sys.argv[1])
    llm = LLM(folder)
    prompt = [i % llm.limits.vocab_size for i in range(min(PROMPT, llm.limits.max_length - 1))]
    llm.generate(prompt, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    peak = get_peak()
    weights = sum(record.nbytes for record in load_weights_index(folder))
    positions = llm.limits.num_pages * llm.limits.page_size
    kv = positions * get_token_bytes(open_package(folder).manifest.library)
    print(json.dumps({"peak_bytes": peak, "weight_bytes": weights, "kv_bytes": kv}), flush=True)
    os._exit(0)  # its threads have nothing to end


def get_peak() -> int:
    """The most memory that this process has held, in bytes."""
    import resource

    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says on Linux is of the process that started this one, if that held more
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
