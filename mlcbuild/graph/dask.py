"""`executor=dask`: the same graph with its steps run by the workers of a Dask scheduler, each in a checkout of its own.

    dask scheduler                                  somewhere; it is no part of mlcbuild
    ./doit worker scheduler=tcp://host:8786         in a checkout on every machine
    ./doit build executor=dask scheduler=tcp://host:8786 remote=http://cache:9090

doit remains what decides the order. A step that is ready, and not in the store here, is sent to a worker that has what
it asks for (`resources` of its Action). What it needs and what it makes moves through the remote cache alone: the
worker restores its inputs by key, runs the step as a local build would, pushes the result, and the build here restores
that. Both compute the key, so a worker with other code, tools or recipes is refused, with what differs.

A worker runs each step in a process of its own, so that it is the code of its checkout as it lies there now. When a
worker dies, Dask gives its step to another; when the remote cache loses something, the step is run here.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from doit.exceptions import TaskError, TaskFailed
from doit.runner import Runner

from mlcbuild.errors import ExecutorError
from mlcbuild.graph.action import Action, get_provenance_path, make_key
from mlcbuild.graph.changes import list_changes
from mlcbuild.graph.execute import execute, is_mendable, restore
from mlcbuild.graph.explain import find_output
from mlcbuild.graph.plan import Plan, get_plan
from mlcbuild.graph.remote import Remote, get_remote
from mlcbuild.graph.reporter import is_step
from mlcbuild.graph.settings import settings
from mlcbuild.graph.workers import end_with
from mlcbuild.graph.workspace import Workspace, get_workspace

CONNECT_SECONDS = 10.0
LOOK_SECONDS = 2.0  # how often a build that waits looks whether there still are workers
PATIENCE = 60.0  # seconds without a worker that could run a step, before it fails
RETRIES = 2  # of a step whose process died; a step that fails by itself is not tried again
MOST_PRINTED = 20_000  # characters


@dataclass(frozen=True, slots=True)
class Job:
    """A step for a worker: what it is, the actions that make its inputs with their keys, what its key is made of, the
    remote cache, whether to run it though it may be cached, and the topic of its messages."""

    action: Action
    before: tuple[tuple[Action, str], ...]
    specification: Mapping[str, Any]
    remote: str
    always: bool
    topic: str


@functools.cache
def get_cluster() -> Cluster:
    """The cluster of this process, connected. ExecutorError when it cannot be used."""
    if get_remote() is None:
        hint = (
            "leave out offline=1" if settings.offline else "remote=URL or MLCBUILD_REMOTE; see ./doit help cache-server"
        )
        raise ExecutorError("executor=dask moves files through a remote cache, and there is none", hint=hint)
    return Cluster(settings.scheduler)


def import_distributed() -> Any:
    """Dask's distributed, which here logs errors only. ExecutorError when it is not installed."""
    try:
        import distributed
    except ImportError as error:
        raise ExecutorError(
            "executor=dask needs the package distributed", hint="MLCBUILD_EXTRAS=distributed ./doit list installs it"
        ) from error
    logging.getLogger("distributed").setLevel(logging.ERROR)
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # what it has to say is said here
    return distributed


class Cluster:
    """A Dask scheduler at `address`, and a topic on which its workers talk to this build."""

    def __init__(self, address: str) -> None:
        distributed = import_distributed()
        self.address = address
        self.topic = f"mlcbuild-{uuid.uuid4().hex}"
        try:
            self.client = distributed.Client(address, timeout=CONNECT_SECONDS)
        except (OSError, ValueError) as error:
            raise ExecutorError(
                f"no Dask scheduler answers at scheduler={address}",
                hint="dask scheduler, and scheduler=tcp://host:8786",
            ) from error

    def submit(self, job: Job) -> Any:
        """The future of a job's result."""
        return self.client.submit(
            run_job,
            job,
            key=f"{job.action.task}-{uuid.uuid4().hex}",
            resources=dict(job.action.resources),
            retries=RETRIES,
            pure=False,
        )

    def wait(self, futures: Mapping[Any, Action]) -> list[Any]:
        """The futures that have ended, at least one. ExecutorError when one of them has had no worker for long."""
        distributed, lonely_since = import_distributed(), time.monotonic()
        while True:
            try:
                return list(distributed.wait(list(futures), LOOK_SECONDS, "FIRST_COMPLETED").done)
            except distributed.TimeoutError:
                missing = self.find_missing(list(futures.values()))
            except (distributed.client.FuturesCancelledError, OSError) as error:
                raise ExecutorError(
                    f"the Dask scheduler at {self.address} has gone away",
                    hint="finished steps are kept; start it and run the same command again",
                ) from error
            if missing is None:
                lonely_since = time.monotonic()
            elif time.monotonic() - lonely_since > PATIENCE:
                raise ExecutorError(
                    f"no worker of {self.address} can run {missing.task}: it needs {describe(missing.resources)}",
                    hint=f"./doit worker scheduler={self.address}, on a machine that has that",
                )

    def find_missing(self, actions: Sequence[Action]) -> Action | None:
        """An action that no worker of now can run, if there is one."""
        workers = self.client.scheduler_info(n_workers=-1)["workers"].values()
        for action in actions:
            if not any(has_resources(worker["resources"], action.resources) for worker in workers):
                return action
        return None


def has_resources(have: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    """Whether a worker has all that an action asks for."""
    return all(have.get(name, 0) >= amount for name, amount in wanted.items())


def describe(resources: Mapping[str, float]) -> str:
    """Resources for people."""
    return ", ".join(name if amount == 1 else f"{name} {amount:g}" for name, amount in resources.items()) or "a worker"


class DaskRunner(Runner):
    """doit's runner with the steps run by a cluster. Tasks that are no steps are run here."""

    def run_tasks(self, task_dispatcher: Any) -> None:
        """Run all; what has not ended when one fails is cancelled."""
        cluster, plan = get_cluster(), get_plan()
        self.over: set[str] = set()
        cluster.client.subscribe_topic(cluster.topic, functools.partial(self.hear, task_dispatcher.tasks))
        flying: dict[Any, Any] = {}
        ended: list[Any] = [None]  # doit's dispatcher wants each finished node back, and None to begin
        try:
            while True:
                for node in ended:
                    self.start_ready(task_dispatcher, node, flying, plan)
                if not flying or self._stop_running:
                    return
                done = cluster.wait({future: plan.actions[node.task.name] for future, node in flying.items()})
                ended = [flying.pop(future) for future in done]
                for future, node in zip(done, ended, strict=True):
                    self.finish_node(node, future)
        except ExecutorError as error:
            self._handle_task_error(next(iter(flying.values())), TaskFailed(str(error)))
        finally:
            with contextlib.suppress(Exception):  # the scheduler may be what has gone
                cluster.client.cancel(list(flying))

    def start_ready(self, dispatcher: Any, node: Any, flying: dict[Any, Any], plan: Plan) -> None:
        """Give back a finished node, and start all that can now be started."""
        while not self._stop_running:
            try:
                node = dispatcher.generator.send(node)
            except StopIteration:
                return
            if node == "hold on":
                return
            if self.select_task(node, dispatcher.tasks):
                job = make_job(plan, plan.actions[node.task.name]) if is_step(node.task) else None
                if job is not None:
                    flying[get_cluster().submit(job)] = node
                    node = None
                else:
                    self.process_task_result(node, self.execute_task(node.task))

    def finish_node(self, node: Any, future: Any) -> None:
        """Restore here what a worker has made; where it has failed, say what it said."""
        task = node.task
        self.over.add(task.name)
        try:
            result = future.result()
        except Exception as error:  # every worker that tried has died, or the step's process on it
            text = f"{task.name} could not be run by a worker: {error or type(error).__name__}"
            result = {"failed": f"{text}\n  hint: often a lack of memory; see the worker's output", "bug": False}
        if "failed" in result:
            task.executed, task.actions[0].out = True, result.get("printed", "")
            self.process_task_result(node, (TaskError if result["bug"] else TaskFailed)(result["failed"]))
            return
        if "missing" in result:
            settings.warn(f"{result['worker']} could not restore {result['missing']}: {task.name} is made here")
        always = settings.always
        settings.always = always and "missing" in result  # else it has just been run
        try:
            fail = task.execute(self.stream)
        finally:
            settings.always = always
        if fail is None and result.get("status") == "run" and task.values["status"] != "run":
            task.values.update(status="run", seconds=result["seconds"], saved=0.0, worker=result["worker"])
        self.process_task_result(node, fail)

    def hear(self, tasks: Mapping[str, Any], event: tuple[Any, Sequence[Any]]) -> None:
        """A message of a worker: a step has begun, or says how far it is, or warns."""
        name, text, fraction, size = event[1]
        if name in self.over:
            return
        if text is None:
            self.reporter.execute_task(tasks[name])
        elif hasattr(self.reporter, "hear"):
            self.reporter.hear([name, text, fraction, size])


def make_job(plan: Plan, action: Action) -> Job | None:
    """The job of an action whose inputs are here; None if it can be restored or has to fail here.

    What made its inputs is given to the remote cache, in case that was built without one.
    """
    workspace, remote = get_workspace(plan.root), get_remote()
    assert remote is not None
    try:
        specification = workspace.make_specification(action)
    except Exception as error:
        if is_mendable(error):
            return None
        raise
    record = workspace.store.load_record(make_key(specification))
    if not settings.always and record is not None and workspace.store.has_blobs(record):
        return None
    before = []
    for maker in (plan.actions[name] for name in action.after if name in plan.actions):
        last = workspace.results.get(maker.task)
        assert last is not None, maker.task
        share(workspace, remote, maker, last.key)
        before.append((maker, last.key))
    url = settings.remote or os.environ["MLCBUILD_REMOTE"]
    return Job(action, tuple(before), specification, url, settings.always, get_cluster().topic)


def share(workspace: Workspace, remote: Remote, action: Action, key: str) -> None:
    """Have the remote cache hold what `key` has made, if the store does."""
    record = workspace.store.load_record(key)
    if record is not None and remote.find(key) is None:
        remote.push(record, workspace.store, functools.partial(settings.tell, action.task))


def run_job(job: Job) -> dict[str, Any]:
    """On a worker, in its folder: the result of a job, made by a process of its own.

    `status` and more of an Outcome; or `failed`, with `bug` and what it `printed`; or `missing`, what no cache has.
    RuntimeError when the process ends without a word.
    """
    worker, result = import_distributed().get_worker(), None
    worker.log_event(job.topic, [job.action.task, None, None, None])
    command = [sys.executable, "-m", __name__, str(os.getpid())]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as printed,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=printed) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:  # it has died: said below
            pickle.dump(job, stdin)
        for line in process.stdout:
            message = json.loads(line)
            if isinstance(message, dict):
                result = message
            else:
                worker.log_event(job.topic, message)
        code = process.wait()
        printed.seek(0)
        text = printed.read()[-MOST_PRINTED:]
    if result is None:
        raise RuntimeError(f"its process on {worker.address} ended with exit code {code}\n{text}".rstrip())
    return {**result, "printed": text, "worker": worker.address}


def run_child(parent: int) -> None:
    """The process of a job: read it from stdin, run it in this folder, write messages and the result to stdout."""
    end_with(parent)
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what steps print is kept apart from what we say
    job: Job = pickle.load(sys.stdin.buffer)

    def tell(task: str, text: str, fraction: float | None = None, size: int | None = None) -> None:
        print(json.dumps([task, text, fraction, size]), file=channel)

    settings.tell = tell
    settings.warn = functools.partial(tell, "")
    settings.remote = os.environ.get("MLCBUILD_REMOTE") or job.remote
    try:
        result = run_here(job, Path.cwd())
    except Exception as error:
        mendable = is_mendable(error)
        result = {"failed": str(error) if mendable else traceback.format_exc(), "bug": not mendable}
    print(json.dumps(result), file=channel)


def run_here(job: Job, root: Path) -> dict[str, Any]:
    """Run a job in the checkout `root`. ExecutorError where that would make something else, or could not share it."""
    workspace, remote = get_workspace(root), get_remote()
    if remote is None or remote.readonly:
        raise ExecutorError(
            f"the worker in {root} may not write to the remote cache", hint="unset MLCBUILD_REMOTE_READONLY"
        )
    for action, key in job.before:
        if not restore(action, key, root):
            return {"missing": action.task}
    specification = workspace.make_specification(job.action)
    if specification != job.specification:
        changes, others = find_changes(job, specification)
        if changes:
            raise ExecutorError(
                f"the worker in {root} would make something else of {job.action.task}: {'; '.join(changes)}",
                hint="give it the same checkout and environment, and start it again",
            )
        return {"missing": others[0]}  # what it has is as good, but not what the build has
    settings.always = job.always
    outcome = execute(job.action, root)
    share(workspace, remote, job.action, outcome.key)
    return asdict(outcome)


def find_changes(job: Job, specification: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What is other in the specification here: what a person has to mend, and which tasks have made other files."""
    changes, others = list_changes(job.specification, specification), []
    for name, path in job.action.inputs.items():
        if job.specification["inputs"][name] != specification["inputs"][name]:
            made = [maker.task for maker, _ in job.before if makes(maker, path)]
            others += made
            changes += [] if made else [f"{path} changed"]
    return changes, others


def makes(action: Action, path: Path) -> bool:
    """Whether an action makes an input: one of its outputs, a file in one, or its provenance."""
    return find_output(action, path) is not None or path == get_provenance_path(action.task)


if __name__ == "__main__":
    run_child(int(sys.argv[1]))
