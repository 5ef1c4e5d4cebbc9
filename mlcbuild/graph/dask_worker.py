"""A worker of a Dask scheduler that runs steps in this checkout, and what it offers them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess

from mlcbuild.errors import ExecutorError
from mlcbuild.graph.dask import CONNECT_SECONDS, import_distributed
from mlcbuild.recipes.load import Recipes
from mlcbuild.recipes.machine import has_program, load_machine
from mlcbuild.recipes.matrix import can_run


def list_resources(recipes: Recipes, slots: int, memory: float | None) -> dict[str, float]:
    """What this machine has, as an Action asks for it. Programs and targets can be used by every slot at once."""
    machine = load_machine()
    targets = [recipes.targets[name] for name in recipes.targets]
    found = {"memory": memory if memory is not None else get_memory(), "gpu": float(count_gpus())}
    found |= {f"target:{target.name}": float(slots) for target in targets if can_run(target, machine)}
    programs = {name for target in targets for name in target.toolchain}
    return found | {f"program:{name}": float(slots) for name in sorted(programs) if has_program(name)}


def get_memory() -> float:
    """GB of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def count_gpus() -> int:
    """NVIDIA GPUs that the driver names; 0 without one."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())


def run_worker(recipes: Recipes, scheduler: str, slots: int, memory: float | None) -> None:
    """Work until Ctrl-C or SIGTERM, or until the scheduler goes away. ExecutorError when it cannot be reached."""
    if not scheduler:
        raise ExecutorError("a worker needs a scheduler", hint="./doit worker scheduler=tcp://host:8786")
    if slots < 1:
        raise ExecutorError(f"slots={slots}: a worker runs at least one step", hint="./doit worker slots=1")
    distributed, resources = import_distributed(), list_resources(recipes, slots, memory)

    async def work() -> None:
        worker = distributed.Worker(
            scheduler, nthreads=slots, resources=resources, memory_limit=0, death_timeout=CONNECT_SECONDS
        )
        try:
            await worker
        except (OSError, ValueError, TimeoutError) as error:
            raise ExecutorError(
                f"no Dask scheduler answers at scheduler={scheduler}",
                hint="dask scheduler, and scheduler=tcp://host:8786",
            ) from error
        offers = ", ".join(f"{name} {amount:g}" for name, amount in resources.items() if amount)
        print(f"worker {worker.address} of {scheduler} in {os.getcwd()}: {offers}", flush=True)
        await worker.finished()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(work())
