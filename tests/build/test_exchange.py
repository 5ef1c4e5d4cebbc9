"""`doit cache pull` and `push`: results go between stores and a remote without anything being built."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_project import doit, make_project, take_log

STEPS = ["convert 4", "package", "verify"]


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """A project that was built without a remote."""
    root = make_project(tmp_path / "one")
    assert doit(root, "build").returncode == 0
    assert take_log(root) == STEPS
    return root


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return make_project(tmp_path / "two")


def exchange(root: Path, verb: str, url: str, *args: str, **settings: str) -> list[str]:
    done = doit(root, "cache", verb, f"remote={url}", *args, **settings)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout.splitlines()


def test_what_was_pushed_is_pulled_and_built_offline(one: Path, two: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path / 'remote'}"
    lines = exchange(one, "push", url)
    assert [line.split()[:2] for line in lines[:3]] == [["push", step] for step in ("convert", "package", "verify")]
    assert lines[3] == "3 pushed, 0 not built here"
    lines = exchange(two, "pull", url)
    assert [line.split()[:2] for line in lines[:3]] == [["pull", step] for step in ("convert", "package", "verify")]
    assert lines[3] == "3 pulled, 0 here already, 0 not there"
    assert not (two / "artifacts/packages").exists()
    assert exchange(two, "pull", url) == ["0 pulled, 3 here already, 0 not there"]
    shutil.rmtree(tmp_path / "remote")
    done = doit(two, "build", "offline=1")
    assert (done.returncode, take_log(two)) == (0, []), done.stdout + done.stderr
    for path in (one / "artifacts/packages").rglob("*.json"):
        assert (two / path.relative_to(one)).read_bytes() == path.read_bytes()


def test_variables_select_what_goes(one: Path, two: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path / 'remote'}"
    assert exchange(one, "push", url, "quantization=q0") == ["0 pushed, 3 not built here"]
    assert exchange(one, "push", url, "quantization=q*")[-1] == "3 pushed, 3 not built here"
    assert exchange(two, "pull", url, "quantization=q0") == ["0 pulled, 0 here already, 3 not there"]
    assert exchange(two, "pull", url, "quantization=*")[-1] == "3 pulled, 0 here already, 3 not there"


def test_a_damaged_blob_is_not_pushed(one: Path, tmp_path: Path) -> None:
    files = [path for path in (one / "artifacts/store/cas").rglob("*") if path.is_file()]
    (blob,) = (path for path in files if path.stat().st_size > 90_000)
    blob.unlink()
    lines = exchange(one, "push", f"file://{tmp_path / 'remote'}")
    assert lines[-1] == "2 pushed, 1 not built here"


def test_a_dead_remote_exits_1(one: Path, two: Path) -> None:
    for root, verb, last in ((one, "push", "0 pushed, 0 not built here"), (two, "pull", "0 pulled, 0 here already")):
        done = doit(root, "cache", verb, "remote=http://127.0.0.1:1")
        assert done.returncode == 1
        assert done.stdout.splitlines()[-1].startswith(last)
        assert done.stderr.startswith("warn  remote cache http://127.0.0.1:1: ")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "settings", "text"),
    [
        (
            ["pull"],
            {},
            "there is no remote cache to exchange results with\n  hint: remote=URL, or MLCBUILD_REMOTE",
        ),
        (
            ["push", "remote=file:///tmp/x", "offline=1"],
            {},
            "there is no remote cache to exchange results with\n  hint: leave out offline=1",
        ),
        (
            ["push", "remote=file:///tmp/x"],
            {"MLCBUILD_REMOTE_READONLY": "1"},
            "nothing may be pushed: MLCBUILD_REMOTE_READONLY=1\n  hint: unset MLCBUILD_REMOTE_READONLY",
        ),
        (["pull", "model=x", "remote=file:///tmp/x"], {}, "unknown model 'x'\n  hint: known: m"),
        (["pull", "modle=m"], {}, "unknown variable 'modle'\n  hint: did you mean model?"),
        (["pull", "m"], {}, "doit cache pull does not take 1 names\n  hint: doit cache pull"),
    ],
)
def test_mistakes_exit_3(two: Path, args: list[str], settings: dict[str, str], text: str) -> None:
    done = doit(two, "cache", *args, **settings)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", f"ERROR: {text}\n")
