"""The fast no-op: a snapshot holds only while nothing has changed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mlcbuild.graph.digest import get_stat
from mlcbuild.graph.snapshot import (
    Snapshot,
    get_snapshot_path,
    is_fresh,
    load_fresh_snapshot,
    make_snapshot,
    save_snapshot,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project with two sources, an output and a folder of recipes."""
    (tmp_path / "recipes").mkdir()
    for name in ("dodo.py", "recipes/tiny.yaml", "out.bin"):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, (1_000_000_000, 1_000_000_000))
    return tmp_path


def take(root: Path, started_ns: int | None = None) -> Snapshot | None:
    return make_snapshot(
        root,
        sources=[Path("dodo.py"), root / "recipes" / "tiny.yaml"],
        outputs={"out.bin": get_stat(root / "out.bin")},
        folders=[root / "recipes"],
        environment=["CUDA_HOME"],
        packages=["artifacts/packages/tiny"],
        skipped=[],
        started_ns=time.time_ns() if started_ns is None else started_ns,
    )


def test_it_holds_while_nothing_changes(root: Path) -> None:
    snapshot = take(root)
    assert snapshot is not None
    path = get_snapshot_path(root, {"model": "tiny"})
    save_snapshot(path, snapshot)
    found = load_fresh_snapshot(path, root)
    assert found is not None
    assert found.packages == ["artifacts/packages/tiny"]
    (root / "recipes" / "__pycache__").mkdir()
    assert load_fresh_snapshot(path, root) is not None


@pytest.mark.parametrize("name", ["dodo.py", "recipes/tiny.yaml", "out.bin"])
@pytest.mark.parametrize("change", ["touch", "grow", "replace", "remove"])
def test_any_changed_file_ends_it(root: Path, name: str, change: str) -> None:
    snapshot = take(root)
    assert snapshot is not None
    path = root / name
    if change == "touch":
        path.touch()
    elif change == "grow":
        path.write_text(path.read_text() + "x")
        os.utime(path, (1_000_000_000, 1_000_000_000))
    elif change == "replace":
        (root / "new").write_text(path.read_text())
        os.replace(root / "new", path)
        os.utime(path, (1_000_000_000, 1_000_000_000))
    else:
        path.unlink()
    assert not is_fresh(snapshot, root)


def test_a_new_recipe_ends_it(root: Path) -> None:
    snapshot = take(root)
    assert snapshot is not None
    (root / "recipes" / "new.yaml").write_text("")
    assert not is_fresh(snapshot, root)


def test_the_environment_ends_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", "/a")
    snapshot = take(root)
    assert snapshot is not None
    assert is_fresh(snapshot, root)
    monkeypatch.setenv("CUDA_HOME", "/b")
    assert not is_fresh(snapshot, root)
    monkeypatch.delenv("CUDA_HOME")
    assert not is_fresh(snapshot, root)


def test_variables_have_snapshots_of_their_own(root: Path) -> None:
    assert get_snapshot_path(root, {"model": "tiny"}) != get_snapshot_path(root, {"model": "llama3"})
    assert get_snapshot_path(root, {"a": "1", "b": "2"}) == get_snapshot_path(root, {"b": "2", "a": "1"})


def test_none_is_taken_of_a_source_that_changed_during_the_build(root: Path) -> None:
    started = time.time_ns()
    assert take(root, started) is not None
    (root / "out.bin").write_text("made by the build")
    assert take(root, started) is not None
    (root / "dodo.py").write_text("edited during the build")
    assert take(root, started) is None
    (root / "dodo.py").unlink()
    assert take(root) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": {}}', "null"])
def test_a_damaged_snapshot_is_none(root: Path, text: str) -> None:
    path = get_snapshot_path(root, {})
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert load_fresh_snapshot(path, root) is None
