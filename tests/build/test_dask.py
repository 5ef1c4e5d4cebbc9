"""executor=dask with a real scheduler, two real workers with stores of their own, and one remote cache."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_project import ROOT, doit, make_command, make_environment, make_project, take_log
from test_workers import list_processes, wait_until

from mlcbuild.errors import ExecutorError
from mlcbuild.graph import dask as dask_module
from mlcbuild.graph.action import Action
from mlcbuild.graph.dask import Cluster, describe, has_resources
from mlcbuild.graph.dask_worker import list_resources
from mlcbuild.graph.results import ResultLog
from mlcbuild.recipes.load import load_recipes

STEPS = ["convert 32", "convert 4", "package", "package", "verify", "verify"]
BOTH = "quantization=*"


@contextlib.contextmanager
def running(command: list[str], folder: Path, pattern: str, **settings: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """A program while it runs, and what it says of its address."""
    environment = make_environment(folder, PYTHONUNBUFFERED="1", **settings)
    log = folder / f"output-{len(list(folder.glob('output-*')))}"
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file)
    try:
        wait_until(lambda: re.search(pattern, log.read_text()) is not None or process.poll() is not None)
        found = re.search(pattern, log.read_text())
        assert found, log.read_text()
        yield found[1], process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def run_scheduler(folder: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "0", "--host", "127.0.0.1"]
    with running([*command, "--no-dashboard"], folder, r"Scheduler at: +(tcp://\S+)") as found:
        yield found


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with run_scheduler(make_project(tmp_path_factory.mktemp("scheduler"))) as (address, _):
        yield address


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[str]:
    project = make_project(tmp_path / "cache")
    shutil.copy(ROOT / "tasks" / "cache_server.py", project / "tasks")
    with running(make_command("cache-server", "port=0"), project, r"remote cache at (\S+)") as (url, _):
        yield url


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "project")


class Workers:
    """Two workers in checkouts of their own, which log to the log of the project."""

    def __init__(self, stack: contextlib.ExitStack, folder: Path, log: Path, scheduler: str, **settings: str) -> None:
        self.roots = [make_project(folder / name) for name in ("one", "two")]
        self.processes: list[subprocess.Popen] = []
        self.addresses: list[str] = []
        for root in self.roots:
            shutil.copy(ROOT / "tasks" / "worker.py", root / "tasks")
            command = make_command("worker", f"scheduler={scheduler}")
            environment = {"FAKE_LOG": str(log), **settings}
            address, process = stack.enter_context(running(command, root, r"worker (tcp://\S+) of", **environment))
            self.addresses.append(address)
            self.processes.append(process)


@pytest.fixture
def start(tmp_path: Path, project: Path, scheduler: str) -> Iterator[Callable[..., Workers]]:
    with contextlib.ExitStack() as stack:
        yield lambda **settings: Workers(stack, tmp_path, project / "log", scheduler, **settings)


def make_arguments(scheduler: str, cache: str) -> list[str]:
    return ["executor=dask", f"scheduler={scheduler}", f"remote={cache}"]


def compare_with_local(project: Path, folder: Path) -> None:
    """Same keys and same bytes as a build on one machine."""
    local = make_project(folder / "local")
    assert doit(local, "build", BOTH).returncode == 0
    for path in (local / "artifacts").rglob("*"):
        name = path.relative_to(local)
        if path.is_file() and not {"store", ".graph"} & set(name.parts):
            assert (project / name).read_bytes() == path.read_bytes(), name
    ours, theirs = (
        {task: result.provenance for task, result in ResultLog(root).load_all()} for root in (project, local)
    )
    assert ours == theirs != {}


def test_two_workers_make_what_one_machine_makes(
    project: Path, scheduler: str, cache: str, start: Callable[..., Workers], tmp_path: Path
) -> None:
    workers = start(FAKE_SLEEP="1")
    done = doit(project, "build", BOTH, *make_arguments(scheduler, cache), "--report", "out.json")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert sorted(take_log(project)) == STEPS
    steps = json.loads((project / "out.json").read_text())["steps"]
    assert [step["status"] for step in steps] == ["run"] * 6
    assert {step["worker"] for step in steps} == set(workers.addresses)
    assert f"  on {workers.addresses[0]}\n" in done.stdout
    assert "Here I am." in done.stdout
    compare_with_local(project, tmp_path)
    stores = [{path.name for path in (root / "artifacts/store/ac").iterdir()} for root in (*workers.roots, project)]
    assert stores[0] | stores[1] == stores[2]
    assert stores[0] != stores[1]
    assert doit(project, "build", BOTH).stdout.startswith("up to date: 2 packages")


def test_killing_one_of_two_workers_loses_nothing(
    project: Path, scheduler: str, cache: str, start: Callable[..., Workers], tmp_path: Path
) -> None:
    """Both convert when one is killed: the other one takes over its step, and all that comes after."""
    workers = start(FAKE_SLEEP="4")
    with run_build(project, BOTH, *make_arguments(scheduler, cache)) as build:
        wait_until(lambda: sorted((project / "log").read_text().split("\n")) == ["", "convert 32", "convert 4"])
        workers.processes[0].kill()
        out, err = build.communicate(timeout=120)
    assert build.returncode == 0, out + err
    wait_until(lambda: list_processes(workers.roots[0]) == {})  # nor does its step go on without it
    log = take_log(project)
    assert sorted(log) in (sorted([*STEPS, "convert 4"]), sorted([*STEPS, "convert 32"]))
    assert out.count(f"  on {workers.addresses[1]}\n") == 6
    compare_with_local(project, tmp_path)


@contextlib.contextmanager
def run_build(project: Path, *args: str) -> Iterator[subprocess.Popen]:
    environment = make_environment(project)
    process = subprocess.Popen(
        make_command("build", *args),
        cwd=project,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_step_that_fails_on_a_worker_fails_here(
    project: Path, scheduler: str, cache: str, start: Callable[..., Workers]
) -> None:
    """It is not tried again: it would fail again. What it printed and its hint are shown."""
    start(FAKE_FAIL="mend")
    done = doit(project, "build", *make_arguments(scheduler, cache))
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == (
        "fail  convert m/q4/rows16\nwhat the step prints\nshard 3 is cut short\n  hint: doit download:m\n"
    )
    assert take_log(project) == ["convert 4"]


def test_what_is_here_is_given_to_the_workers(
    project: Path, scheduler: str, cache: str, start: Callable[..., Workers]
) -> None:
    """The first steps were built without a remote cache; the worker gets them through it all the same."""
    assert doit(project, "build").returncode == 0
    (project / "tasks/verify.py").write_text((project / "tasks/verify.py").read_text().replace("0.0125", "0.0126"))
    take_log(project)
    workers = start()
    for root in workers.roots:
        shutil.copy(project / "tasks/verify.py", root / "tasks/verify.py")
    done = doit(project, "build", *make_arguments(scheduler, cache))
    assert done.returncode == 0, done.stdout + done.stderr
    assert take_log(project) == ["verify"]
    assert [line.split()[0] for line in done.stdout.splitlines()[:3]] == ["ok", "ok", "run"]


def test_a_worker_of_another_commit_is_refused(
    project: Path, scheduler: str, cache: str, start: Callable[..., Workers]
) -> None:
    workers = start()
    for root in workers.roots:
        maths = root / "tasks/shared/maths.py"
        maths.write_text(maths.read_text().replace("2 * x", "3 * x"))
    done = doit(project, "build", *make_arguments(scheduler, cache))
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0] == "fail  convert m/q4/rows16"
    assert lines[1] in [
        f"the worker in {root} would make something else of convert:m/q4/rows16: tasks/shared/maths.py changed"
        for root in workers.roots
    ]
    assert lines[2] == "  hint: give it the same checkout and environment, and start it again"
    assert take_log(project) == []


def test_a_scheduler_that_goes_away(project: Path, cache: str, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack, run_scheduler(make_project(tmp_path / "mine")) as (address, process):
        Workers(stack, tmp_path, project / "log", address, FAKE_SLEEP="30")
        with run_build(project, *make_arguments(address, cache)) as build:
            wait_until(lambda: "convert 4" in (project / "log").read_text())
            process.send_signal(signal.SIGTERM)
            out, err = build.communicate(timeout=60)
    assert (build.returncode, err) == (1, "")
    assert out == (
        f"fail  convert m/q4/rows16\nthe Dask scheduler at {address} has gone away\n"
        "  hint: finished steps are kept; start it and run the same command again\n"
    )


def test_a_step_that_no_worker_can_run(scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_module, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(dask_module, "PATIENCE", 0.2)
    cluster = Cluster(scheduler)
    action = Action("compile", "m", "tasks.compile", {}, {}, {}, resources={"program:nvcc": 1.0, "memory": 2.0})
    try:
        future = cluster.client.submit(abs, -1, resources={"program:nvcc": 1.0})
        with pytest.raises(ExecutorError) as caught:
            cluster.wait({future: action})
    finally:
        cluster.client.close()
    assert str(caught.value) == (
        f"no worker of {scheduler} can run compile:m: it needs program:nvcc, memory 2\n"
        f"  hint: ./doit worker scheduler={scheduler}, on a machine that has that"
    )


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["executor=ray"], "unknown executor 'ray'\n  hint: executor=local or executor=dask"),
        (["executor=dask"], "executor=dask needs a scheduler\n  hint: scheduler=tcp://host:8786"),
        (
            ["executor=dask", "scheduler=tcp://127.0.0.1:1"],
            "executor=dask moves files through a remote cache, and there is none\n"
            "  hint: remote=URL or MLCBUILD_REMOTE; see ./doit help cache-server",
        ),
        (
            ["executor=dask", "scheduler=tcp://127.0.0.1:1", "remote=file:///tmp/none", "offline=1"],
            "executor=dask moves files through a remote cache, and there is none\n  hint: leave out offline=1",
        ),
        (
            ["executor=dask", "scheduler=host", "remote=file:///tmp/none", "-n", "2"],
            "-n is for executor=local: Dask's workers say how many steps run at once",
        ),
        (
            ["executor=dask", "scheduler=tcp://127.0.0.1:1", "remote=file:///tmp/none"],
            "no Dask scheduler answers at scheduler=tcp://127.0.0.1:1\n"
            "  hint: dask scheduler, and scheduler=tcp://host:8786",
        ),
    ],
)
def test_mistakes_exit_3(project: Path, args: list[str], text: str) -> None:
    done = doit(project, "build", *args)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", f"ERROR: {text}\n")
    assert take_log(project) == []


def test_without_distributed(project: Path, tmp_path: Path) -> None:
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "distributed.py").write_text("raise ImportError\n")
    settings = {"PYTHONPATH": str(tmp_path / "without")}
    args = ["executor=dask", "scheduler=tcp://127.0.0.1:1", "remote=file:///tmp/none"]
    done = doit(project, "build", *args, **settings)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == (
        "ERROR: executor=dask needs the package distributed\n"
        "  hint: MLCBUILD_EXTRAS=distributed ./doit list installs it\n"
    )


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ([], "a worker needs a scheduler\n  hint: ./doit worker scheduler=tcp://host:8786"),
        (
            ["scheduler=tcp://127.0.0.1:1", "slots=many"],
            "the worker cannot start: invalid literal for int() with base 10: 'many'\n"
            "  hint: ./doit worker slots=2 memory=64",
        ),
        (
            ["scheduler=tcp://127.0.0.1:1", "slots=0"],
            "slots=0: a worker runs at least one step\n  hint: ./doit worker slots=1",
        ),
        (
            ["scheduler=tcp://127.0.0.1:1"],
            "no Dask scheduler answers at scheduler=tcp://127.0.0.1:1\n"
            "  hint: dask scheduler, and scheduler=tcp://host:8786",
        ),
    ],
)
def test_mistakes_of_a_worker(project: Path, args: list[str], text: str) -> None:
    shutil.copy(ROOT / "tasks" / "worker.py", project / "tasks")
    done = doit(project, "worker", *args)
    assert done.returncode == 1
    assert f"fail  worker\n{text}\n" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_worker_offers_what_its_machine_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("nvcc", "cc"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n[ $1 = -L ] && printf 'GPU 0: a\\nGPU 1: b\\n' || echo 9.0\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    found = list_resources(load_recipes(ROOT / "recipes"), 3, None)
    assert found["gpu"] == 2.0
    assert found["memory"] == pytest.approx(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9)
    assert found["program:nvcc"] == found["program:cc"] == 3.0
    assert "target:cuda-sm90" in found or "x86-64" not in " ".join(found)
    assert "target:cuda-sm80" not in found
    assert has_resources(found, {"gpu": 2.0, "program:cc": 1.0})
    assert not has_resources(found, {"gpu": 3.0})
    assert not has_resources(found, {"program:clang": 1.0})
    assert describe({}) == "a worker"
