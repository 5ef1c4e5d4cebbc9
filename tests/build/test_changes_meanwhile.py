"""What changes while a build uses it is noticed: no result is kept under a key that it does not belong to."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
from small_project import VARIANT, doit, make_command, make_environment, make_project, take_log
from test_command import wait_for_log

STEPS = ["convert 4", "package", "verify"]
AGAIN = "  hint: run the same command again, with no other build or editor at work on it\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "project")


def start_build(root: Path) -> subprocess.Popen[str]:
    """A build that goes on beside the test."""
    return subprocess.Popen(
        make_command("build"), cwd=root, env=make_environment(root), stdout=-1, stderr=-1, text=True
    )


def build_and_edit(root: Path, step: str, file: str, old: str, new: str) -> tuple[int, str]:
    """A build that is slow in `step`, and an edit of a file in the middle of that: exit code and all that it says."""
    path = root / "tasks" / f"{step}.py"
    text = path.read_text()
    path.write_text(text.replace("def run(ctx):\n", f'def run(ctx):\n    log("{step} begins")\n    time.sleep(1.5)\n'))
    process = start_build(root)
    wait_for_log(root, f"{step} begins")
    edited = (root / file).read_text()
    assert old in edited
    (root / file).write_text(edited.replace(old, new))
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in out + err
    take_log(root)
    return process.returncode, out + err


def list_runs(root: Path) -> list[str]:
    done = doit(root, "build")
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in take_log(root) if "begins" not in line]


def test_an_input_of_the_running_step(project: Path) -> None:
    code, said = build_and_edit(project, "convert", "recipes/models/m/weights.txt", "5", "6")
    assert code == 1
    assert (f"convert:m/q4/rows16: recipes/models/m changed while it ran, so nothing was kept of it\n{AGAIN}") in said
    assert not (project / "artifacts/weights").exists()
    assert list((project / "artifacts/store/ac").iterdir()) == []
    assert list_runs(project) == STEPS
    assert (project / "artifacts/weights/m-q4-rows16/w.txt").read_text() == "16"
    (project / "recipes/models/m/weights.txt").write_text("5")
    assert list_runs(project) == STEPS  # it was not kept under this key either
    assert (project / "artifacts/weights/m-q4-rows16/w.txt").read_text() == "14"


def test_the_code_of_the_running_step(project: Path) -> None:
    code, said = build_and_edit(project, "convert", "tasks/shared/maths.py", "return 2 * x", "return 7 * x")
    assert code == 1
    assert "tasks/shared/maths.py changed while the build runs\n  hint: run the same command again\n" in said
    assert list_runs(project) == STEPS


def test_a_comment_does_not_count(project: Path) -> None:
    code, said = build_and_edit(project, "convert", "tasks/shared/maths.py", "return 2 * x", "return 2 * x  # twice")
    assert code == 0, said
    assert list_runs(project) == []


def test_the_code_of_a_step_to_come(project: Path) -> None:
    """It is imported already: what would run is not what its key would say."""
    code, said = build_and_edit(project, "convert", "tasks/package.py", "12_345_678", "9")
    assert code == 1
    assert "tasks/package.py changed while the build runs\n  hint: run the same command again\n" in said
    assert list_runs(project) == ["package", "verify"]


def test_what_a_finished_step_was_made_of(project: Path) -> None:
    code, said = build_and_edit(project, "verify", "recipes/models/m/weights.txt", "5", "6")
    assert code == 2
    assert (
        "ERROR: changed while it was built, by an edit or by another build: convert:m/q4/rows16\n"
        "  hint: run the same command again\n"
    ) in said
    assert list_runs(project) == STEPS


def test_another_build_of_other_sources(project: Path) -> None:
    """Both use the same folders. The one that began first cannot end well, and says so."""
    package, weights = project / "tasks/package.py", project / "artifacts/weights/m-q4-rows16/w.txt"
    wait = 'def run(ctx):\n    log("p")\n    while not os.path.exists("go on"):\n        time.sleep(0.02)\n'
    package.write_text(package.read_text().replace("def run(ctx):\n", wait))
    first = start_build(project)
    wait_for_log(project, "p\n")
    (project / "recipes/models/m/weights.txt").write_text("6")
    second, deadline = start_build(project), time.monotonic() + 60
    while not weights.exists() or weights.read_text() != "16":  # the second has made its own in their place
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (project / "go on").touch()
    out, err = first.communicate(timeout=60)
    assert first.returncode == 1, out + err
    assert f"package:{VARIANT}: artifacts/weights/m-q4-rows16 changed while it ran" in out + err
    out, err = second.communicate(timeout=60)
    assert second.returncode == 0, out + err
    assert weights.read_text() == "16"
    take_log(project)
    assert list_runs(project) == []
