"""`doit build -n 2`: steps run side by side, and no worker outlives the build or dies unnoticed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from small_project import doit, make_command, make_environment, make_project, take_log


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "project")


def start(root: Path) -> subprocess.Popen[str]:
    """A build of both variants with two workers, both in their convert, which starts a program and takes a minute."""
    convert = root / "tasks" / "convert.py"
    text = convert.read_text()
    slow = "    time.sleep(float("
    assert slow in text
    convert.write_text(text.replace(slow, f'    if "FAKE_SLEEP" in os.environ: os.system("sleep 61")\n{slow}'))
    process = subprocess.Popen(
        make_command("build", "quantization=*", "-n", "2"),
        cwd=root,
        env=make_environment(root, FAKE_SLEEP="60"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: sorted((root / "log").read_text().split("\n")) == ["", "convert 32", "convert 4"])
    wait_until(lambda: sum(name == "sleep" for name in list_processes(root).values()) == 2)
    return process


def wait_until(condition: object) -> None:
    deadline = time.monotonic() + 60
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def list_processes(root: Path) -> dict[int, str]:
    """Every living process that works in the project: its name by id."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and os.readlink(folder / "cwd") == str(root):
                found[int(folder.name)] = (folder / "comm").read_text().strip()
        except OSError:  # it has ended, or is somebody else's
            continue
    return found


def check_rest(project: Path) -> None:
    """Nothing half-made was left, and the same command builds all."""
    assert not (project / "artifacts" / "weights").exists()
    take_log(project)
    done = doit(project, "build", "quantization=*", "-n", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(take_log(project)) == ["convert 32", "convert 4", "package", "package", "verify", "verify"]


@pytest.mark.parametrize(("number", "text"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_stopped_build_takes_everything_with_it(project: Path, number: signal.Signals, text: str) -> None:
    process = start(project)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert list_processes(project) == {}
    assert process.returncode == 130
    assert "Traceback" not in out + err
    assert f"{text}: finished steps are kept, the same command goes on from here" in err
    check_rest(project)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_build_without_workers_leaves_no_program_either(project: Path, number: signal.Signals) -> None:
    """The step waits for a program that it has started, as the compile step does for the linker."""
    convert = project / "tasks" / "convert.py"
    edit = '    import subprocess\n    if "FAKE_SLEEP" in os.environ: subprocess.run(["sleep", "61"])\n    time.sleep('
    convert.write_text(convert.read_text().replace("    time.sleep(", edit))
    process = subprocess.Popen(
        make_command("build"),
        cwd=project,
        env=make_environment(project, FAKE_SLEEP="60"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: "sleep" in list_processes(project).values())
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in out + err
    assert list_processes(project) == {}
    assert not (project / "artifacts" / "weights").exists()
    take_log(project)
    assert doit(project, "build").returncode == 0
    assert take_log(project) == ["convert 4", "package", "verify"]


def test_workers_do_not_outlive_a_killed_build(project: Path) -> None:
    process = start(project)
    process.kill()
    process.wait(timeout=30)
    wait_until(lambda: set(list_processes(project).values()) <= {"sh", "sleep"})
    for orphan in list_processes(project):  # a program that a worker has started may end its work, on scratch
        os.kill(orphan, signal.SIGKILL)
    process.communicate(timeout=30)
    check_rest(project)


def test_a_killed_worker_ends_the_build(project: Path) -> None:
    process = start(project)
    workers = [number for number in list_processes(project) if get_parent(number) == process.pid]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 2, out + err
    assert "a worker was killed (signal 9); signal 9 is often a lack of memory\n  hint: run the same command" in out
    assert "Traceback" not in out + err
    assert list_processes(project) == {}
    check_rest(project)


def get_parent(number: int) -> int:
    return int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])


def test_two_steps_run_at_once(project: Path) -> None:
    started = time.perf_counter()
    done = doit(project, "build", "quantization=*", "-n", "2", FAKE_SLEEP="3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert time.perf_counter() - started < 6 or os.getloadavg()[0] > 2 * (os.cpu_count() or 1)
    assert sorted(take_log(project)) == ["convert 32", "convert 4", "package", "package", "verify", "verify"]


def test_a_failure_shows_its_own_output(project: Path) -> None:
    done = doit(project, "build", "quantization=*", "-n", "2", FAKE_FAIL="mend")
    assert done.returncode != 0
    assert "fail  convert m/q4/rows16" in done.stdout
    assert "what the step prints" in done.stdout
    assert "shard 3 is cut short\n  hint: doit download:m\n" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
