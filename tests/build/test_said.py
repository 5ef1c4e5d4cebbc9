"""What commands say of tasks, and that they end without a word when nobody reads on."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from small_project import VARIANT, doit, make_command, make_environment, make_project


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "project")


def say_status(root: Path, task: str) -> tuple[int, list[str]]:
    """The exit code of `doit info`, and what it says of the task's status."""
    done = doit(root, "info", task)
    assert done.stderr == ""
    status = re.search(r"status     : (.*?)(\n\n|$)", done.stdout, re.DOTALL)
    assert status is not None, done.stdout
    return done.returncode, [" ".join(line.split()) for line in status[1].splitlines()]


def test_info_says_why_a_task_is_not_up_to_date(project: Path) -> None:
    first = ["run", *(f"* run {step} not built here yet" for step in ("convert m/q4/rows16", f"package {VARIANT}"))]
    assert say_status(project, f"package:{VARIANT}") == (1, first)
    assert say_status(project, f"build:{VARIANT}") == (1, [*first, f"* run verify {VARIANT} not built here yet"])
    assert say_status(project, "serve") == (1, ["run", "* It runs whenever it is asked for."])
    assert doit(project, "build").returncode == 0
    assert say_status(project, f"build:{VARIANT}") == (0, ["up-to-date"])
    recipe = project / "recipes/quantizations/q4.yaml"
    recipe.write_text(recipe.read_text().replace("bits: 4", "bits: 8"))
    assert say_status(project, "convert:m/q4/rows16") == (1, ["run", "* run convert m/q4/rows16 bits 4 -> 8"])
    unknown = doit(project, "info", "convert:m/q5/rows16")
    assert (unknown.returncode, unknown.stderr) == (3, "ERROR: 'convert:m/q5/rows16' is not a task.\n")


def test_code_that_is_not_python(project: Path) -> None:
    maths = project / "tasks/shared/maths.py"
    maths.write_text(maths.read_text().replace("def double(x):", "def double(x:"))
    for command in ("build", "explain", "list"):
        done = doit(project, command)
        said = "ERROR: tasks/shared/maths.py:3: '(' was never closed\n  hint: mend it, and run it again\n"
        assert (done.returncode, done.stdout, done.stderr) == (3, "", said)


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize(
    "command",
    ["list", f"info build:{VARIANT}", "explain", "help", "help serve", "cache stat", "build", "build -n 2"],
)
def test_it_ends_without_a_word_when_nobody_reads(project: Path, command: str, buffered: bool) -> None:
    """As `| head -1` does to it, but sooner."""
    environment = make_environment(project)
    environment.pop("PYTHONUNBUFFERED", None)
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        make_command(*command.split()),
        cwd=project,
        env=environment if buffered else {**environment, "PYTHONUNBUFFERED": "1"},
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
    assert doit(project, "build").returncode == 0
