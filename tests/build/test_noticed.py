"""The quick ways to see that nothing changed miss nothing: each kind of edit, and what the next build does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked_doit import Done, Forge
from small_project import VARIANT, make_project, take_log

WEIGHTS = "artifacts/weights/m-q4-rows16/w.txt"
PACKAGE = f"artifacts/packages/{VARIANT.replace('/', '-')}"
ALL = ["convert 4", "package", "verify"]
TAMPER = """
    if os.environ.get("TAMPER"):
        path = Path(os.environ["TAMPER"])
        path.chmod(0o644)
        path.write_text("somebody edits this while the build goes on")
"""


@pytest.fixture(scope="module")
def forge() -> Iterator[Forge]:
    with Forge() as forge:
        yield forge


@pytest.fixture
def root(forge: Forge, tmp_path: Path) -> Path:
    """A project that was built, so that the snapshot says that nothing is to be done."""
    root = make_project(tmp_path / "project")
    assert build(forge, root) == (ALL, ["run"] * 3)
    assert build(forge, root) == ([], ["up"])
    return root


def build(forge: Forge, root: Path, *args: str, **environment: str) -> tuple[list[str], list[str]]:
    """The steps that have run, and the statuses that are shown."""
    done: Done = forge.run(root, "build", *args, FAKE_LOG=str(root / "log"), **environment)
    assert done.code == 0, done.text
    shown = [line.split()[0] for line in done.text.splitlines() if line.startswith(("run ", "hit ", "ok ", "up to"))]
    return take_log(root), shown if shown == ["up"] else [status for status in shown if status != "up"]


def replace(name: str, old: str, new: str) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        path = root / name
        text = path.read_text()
        assert old in text
        path.chmod(0o644)
        path.write_text(text.replace(old, new))
        os.utime(path, (1_700_000_100, 1_700_000_100))  # older than the build

    return edit


def delete(name: str) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return edit


def add(name: str, text: str) -> Callable[[Path], None]:
    return lambda root: (root / name).write_text(text) and None


def swap(name: str) -> Callable[[Path], None]:
    """Another file of the same size and time takes the place of this one."""

    def edit(root: Path) -> None:
        path, other = root / name, root / "other"
        other.write_text("6")
        stat = path.stat()
        assert stat.st_size == other.stat().st_size
        os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        os.replace(other, path)

    return edit


EDITS: dict[str, tuple[Callable[[Path], None], list[str], list[str]]] = {
    "an input": (replace("recipes/models/m/weights.txt", "5", "6"), ALL, ["run"] * 3),
    "an input, replaced by one of its size and time": (swap("recipes/models/m/weights.txt"), ALL, ["run"] * 3),
    "one more input": (add("recipes/models/m/more.txt", "x"), ["convert 4"], ["run", "ok", "ok"]),
    "a parameter": (
        replace("recipes/quantizations/q4.yaml", "bits: 4", "bits: 3"),
        ["convert 3", "package", "verify"],
        ["run"] * 3,
    ),
    "a parameter that no step takes": (
        replace("recipes/quantizations/q4.yaml", "group_size: 32", "group_size: 64"),
        [],
        ["ok"] * 3,
    ),
    "another variant": (
        replace("recipes/matrices/default.yaml", "[q4]", "[q0]"),
        ["convert 32", "package", "verify"],
        ["run"] * 3,
    ),
    "code of a step": (
        replace("tasks/package.py", "12_345_678", "12_345_679"),
        ["package", "verify"],
        ["ok", *["run"] * 2],
    ),
    "code that a step imports": (replace("tasks/shared/maths.py", "2 * x", "x + x + 1"), ALL, ["run"] * 3),
    "code that means the same": (
        replace("tasks/shared/maths.py", "2 * x", "x + x"),
        ["convert 4"],
        ["run", "ok", "ok"],
    ),
    "code that it does not reach": (replace("tasks/shared/maths.py", "3 * x", "4 * x"), [], ["ok"] * 3),
    "a comment": (replace("tasks/convert.py", "# a comment", "# another"), [], ["ok"] * 3),
    "an output, edited": (replace(WEIGHTS, "1", "2"), [], ["hit", "ok", "ok"]),
    "an output, deleted": (delete(WEIGHTS), [], ["hit", "ok", "ok"]),
    "a folder of outputs": (delete(PACKAGE), [], ["ok", "hit", "hit"]),
    "all that is known": (delete("artifacts/.graph"), [], ["hit", "hit", "hit"]),
    "outputs and store": (delete("artifacts"), ALL, ["run"] * 3),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_noticed(forge: Forge, root: Path, name: str) -> None:
    edit, steps, statuses = EDITS[name]
    edit(root)
    assert build(forge, root) == (steps, statuses)
    again = build(forge, root)
    assert again[0] == []
    assert again[1] in (["up"], ["ok"] * 3)  # no snapshot is taken of files that were written just now
    assert build(forge, root, "--no-snapshot") == ([], ["ok"] * 3)


def test_an_edit_during_the_build_is_noticed(forge: Forge, tmp_path: Path) -> None:
    """It happens after the file was made and before the build ends: the snapshot must not take it for what was made."""
    root = make_project(tmp_path / "project")
    with open(root / "tasks/verify.py", "a") as file:
        file.write(TAMPER)
    os.utime(root / "tasks/verify.py", (1_700_000_000, 1_700_000_000))
    assert forge.run(root, "build", FAKE_LOG=str(root / "log"), TAMPER=str(root / WEIGHTS)).code == 2
    assert take_log(root) == ALL
    steps, statuses = build(forge, root)
    assert steps == []
    assert statuses.count("hit") == 1
    assert "somebody" not in (root / WEIGHTS).read_text()
