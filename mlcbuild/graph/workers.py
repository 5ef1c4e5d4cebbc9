"""The workers of `doit build -n N`: doit's own, which here neither outlive the build nor die unnoticed.

doit's runner leaves its workers behind when it is killed, waits for ever for one that is, and reaches a worker only
between two lines of Python, which a compiler does not come to. Here each worker leads a process group of its own, so
that it is ended together with the programs it has started, and the kernel ends it when the build is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import multiprocessing.queues
import os
import queue
import signal
import sys
from typing import Any

from doit.exceptions import InvalidTask
from doit.runner import MRunner

PR_SET_PDEATHSIG = 1  # of Linux
LOOK_SECONDS = 0.5
PATIENCE = 5.0  # seconds between SIGTERM and SIGKILL


class ResultQueue(multiprocessing.queues.Queue):  # type: ignore[type-arg]
    """What workers send; the build that waits for it looks now and then whether they live."""

    def __init__(self, runner: WorkerRunner) -> None:
        super().__init__(ctx=multiprocessing.get_context())
        self._runner = runner
        self._owner = os.getpid()

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """The next item. InvalidTask, in the build's own process, if there is none and a worker was killed."""
        if not block or timeout is not None or os.getpid() != self._owner:
            return super().get(block, timeout)
        while True:
            with contextlib.suppress(queue.Empty):
                return super().get(True, LOOK_SECONDS)
            self._runner.check_workers()


class WorkerRunner(MRunner):
    """doit's runner with worker processes."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.workers: list[Any] = []
        self.build = os.getpid()

    def Queue(self) -> ResultQueue:
        """For doit, which makes its two queues with it."""
        return ResultQueue(self)

    def run_tasks(self, task_dispatcher: Any) -> None:
        """Run all; however it ends, no worker is left."""
        try:
            super().run_tasks(task_dispatcher)
        finally:
            self.end_workers()

    def _run_start_processes(self, job_q: Any, result_q: Any) -> list[Any]:
        self.workers = list(super()._run_start_processes(job_q, result_q))
        return self.workers

    def execute_task_subprocess(self, job_q: Any, result_q: Any, reporter_class: Any) -> None:
        """The life of a worker."""
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # at once, whatever it does: what it has made so far is scratch
        end_with(self.build)
        super().execute_task_subprocess(job_q, result_q, reporter_class)

    def check_workers(self) -> None:
        """InvalidTask when a worker has ended otherwise than by itself."""
        for worker in self.workers:
            if worker.exitcode not in (None, 0):
                how = f"signal {-worker.exitcode}" if worker.exitcode < 0 else f"exit code {worker.exitcode}"
                raise InvalidTask(
                    f"a worker was killed ({how}); signal 9 is often a lack of memory\n"
                    "  hint: run the same command again, with a smaller -n; finished steps are kept"
                )

    def end_workers(self) -> None:
        """End every worker that has not ended by itself, and what any of them has started and left."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            living = multiprocessing.active_children()  # one may have begun before we heard of it
            for worker in {*self.workers, *living}:
                if worker.exitcode != 0:
                    with contextlib.suppress(ProcessLookupError):  # it has no group yet, or no more
                        os.killpg(worker.pid, number)
            for worker in living:
                worker.terminate()
                worker.join(PATIENCE)


def end_with(parent: int) -> None:
    """Have the kernel end this process when the process `parent`, which has started it, is gone; at once if it is."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before we asked
        os._exit(1)
