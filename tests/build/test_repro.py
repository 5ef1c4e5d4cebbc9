"""`doit repro`: two builds in two folders are the same bit by bit, and what is not is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from real_project import copy_project
from real_project import doit as run_real_doit
from small_project import VARIANT, doit, make_project, take_log

OTHER = "artifacts/.graph/repro"
WEIGHTS = "artifacts/weights/m-q4-rows16"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "project")


def edit(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_what_is_the_same(project: Path) -> None:
    done = doit(project, "repro")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(
        "\n\nsame     convert   m/q4/rows16  2 files\n"
        f"same     package   {VARIANT}  1 files\n\n"
        "reproduced: 3 files, bit by bit\n"
    )
    assert take_log(project) == ["convert 4", "package"] * 2
    assert not (project / OTHER).exists()


def test_what_differs_is_named(project: Path) -> None:
    convert = project / "tasks/convert.py"
    good = convert.read_text()
    edit(convert, 'print("what', '(folder / "place.txt").write_text("in " + os.getcwd())\n    print("what')
    done = doit(project, "repro")
    here, other = (len(f"in {root}") for root in (project, project / OTHER))
    assert done.returncode == 1
    assert (
        "\ndiffers  convert   m/q4/rows16  3 files\n"
        f"         {WEIGHTS}/place.txt has {here} bytes, {other} in the other build\n"
        f"same     package   {VARIANT}  1 files\n"
    ) in done.stdout
    assert (
        "1 of 2 actions are not reproducible\n"
        f"  hint: look for a time, a path, or the order of a set; the other build is kept in {OTHER}\n"
    ) in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert (project / OTHER / WEIGHTS / "place.txt").read_text() == f"in {project / OTHER}"
    convert.write_text(good)
    edit(convert, 'b"x" * 100_000', 'b"x" * 90_000 + os.environ.get("TZ", "Europe/Berlin!").encode() + b"x" * 10_000')
    text = f"{WEIGHTS}/big.bin differs in 13 of 100014 bytes, first at byte 90000\n"
    assert text in doit(project, "repro", TZ="UTC/anywhere!!").stdout
    convert.write_text(good)
    assert doit(project, "repro").returncode == 0
    assert not (project / OTHER).exists()


def test_a_key_that_knows_the_folder_is_named(project: Path) -> None:
    edit(project / "tasks/package.py", "__name__, {}", '__name__, {"at": str(plan.root)}')
    done = doit(project, "repro")
    assert done.returncode == 1
    assert f"differs  package   {VARIANT}  1 files\n         key: at /" in done.stdout


def test_a_build_that_fails_elsewhere(project: Path) -> None:
    edit(
        project / "tasks/convert.py",
        'print("what',
        'if "repro" in os.getcwd(): raise WeightError("no", hint="none")\n    print("what',
    )
    done = doit(project, "repro")
    assert done.returncode == 1
    assert f"the build in {OTHER} failed\n  hint: see above; what it needs may be outside" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_tiny_is_reproducible(tmp_path: Path, store: Path) -> None:
    """The real thing: keys, weights, library and package of two builds in two folders, the first from the store."""
    project = copy_project(tmp_path / "project")
    done = run_real_doit(project, store, "repro")
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert [line.split()[:2] for line in said[-7:-2] if line] == [
        ["same", step] for step in ("compile", "download", "convert", "package")
    ]
    assert sum(line.startswith("run ") for line in said) == 4  # of the second build
    assert said[-1].startswith("reproduced: ")
