"""Two checkouts that share a remote cache, as users type it, on the small project of fake steps."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_project import copy_project
from real_project import doit as real_doit
from small_project import ROOT, doit, make_command, make_environment, make_project, take_log

STEPS = ["convert 4", "package", "verify"]
DEAD = "http://127.0.0.1:1"


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return make_project(tmp_path / "one")


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return make_project(tmp_path / "two")


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """The address of `doit cache-server`, run in a third checkout."""
    project = make_project(tmp_path / "server")
    shutil.copy(ROOT / "tasks" / "cache_server.py", project / "tasks")
    command, environment = make_command("cache-server", "port=0"), make_environment(project, PYTHONUNBUFFERED="1")
    with subprocess.Popen(
        command, cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("remote cache at http://127.0.0.1:"), line
        yield line.split()[3]
        process.terminate()
        out, err = process.communicate(timeout=30)
        assert process.returncode in (0, 130), out + err
        assert "Traceback" not in out + err


def build(root: Path, *args: str, **settings: str) -> tuple[list[str], list[str]]:
    """Build in `root`: the words that its lines begin with, and the steps that have run."""
    done = doit(root, "build", *args, **settings)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    words = [line.partition("  ")[0] for line in done.stdout.splitlines() if line and line[0].islower()]
    return [" ".join(word.split()[:2]) if word.startswith("remote") else word.split()[0] for word in words][
        : -2 if "variant" in done.stdout else None
    ], take_log(root)


def test_a_second_checkout_restores_what_the_first_has_built(url: str, one: Path, two: Path) -> None:
    assert build(one, f"remote={url}") == (["run"] * 3, STEPS)
    assert build(two, MLCBUILD_REMOTE=url) == (["remote hit"] * 3, [])
    for path in (one / "artifacts" / "packages").rglob("*"):
        if path.is_file():
            assert (two / path.relative_to(one)).read_bytes() == path.read_bytes()
    assert build(two) == (["up"], [])
    assert build(two, f"remote={url}") == (["up"], [])  # where results come from does not change what is built
    assert doit(two, "clean").returncode == 0
    assert build(two, f"remote={url}") == (["hit"] * 3, [])


def test_pull_requests_read_only(url: str, one: Path, two: Path) -> None:
    assert build(one, MLCBUILD_REMOTE=url, MLCBUILD_REMOTE_READONLY="1") == (["run"] * 3, STEPS)
    assert build(two, MLCBUILD_REMOTE=url, MLCBUILD_REMOTE_READONLY="1") == (["run"] * 3, STEPS)


def test_a_shared_folder_is_a_remote_too(tmp_path: Path, one: Path, two: Path) -> None:
    assert build(one, f"remote=file://{tmp_path}/shared") == (["run"] * 3, STEPS)
    assert build(two, f"remote=file://{tmp_path}/shared") == (["remote hit"] * 3, [])


def test_a_damaged_blob_is_built_anew(tmp_path: Path, one: Path, two: Path) -> None:
    build(one, f"remote=file://{tmp_path}/shared")
    for path in (tmp_path / "shared" / "cas").iterdir():
        if path.stat().st_size == 100_000:
            path.write_bytes(b"y" * 100_000)
    words, log = build(two, f"remote=file://{tmp_path}/shared")
    assert (words, log) == (["warn", "run", *["remote hit"] * 2], STEPS[:1])
    weights = "artifacts/weights/m-q4-rows16/big.bin"
    assert (two / weights).read_bytes() == (one / weights).read_bytes()


def test_explain_knows_what_the_remote_has(url: str, one: Path, two: Path) -> None:
    build(one, f"remote={url}")
    done = doit(two, "explain", f"remote={url}")
    assert (done.returncode, done.stderr, take_log(two)) == (0, "", [])
    lines = done.stdout.splitlines()
    assert [line.split()[:3] for line in lines[:3]] == [["remote", "hit", step.split()[0]] for step in STEPS]
    assert lines[3:] == ["0 ok, 0 hit, 3 remote hit, 0 run"]
    assert not (two / "artifacts" / "packages").exists()


def test_the_real_project_is_restored_without_compiling(url: str, tmp_path: Path, store: Path) -> None:
    """What a checkout has pushed serves another one, whose own store is empty."""
    for name, word, where in (("one", "hit", store), ("two", "remote hit", tmp_path / "store")):
        project = copy_project(tmp_path / name)
        if name == "two":
            pushed = real_doit(tmp_path / "one", store, "cache", "push", f"remote={url}")
            assert pushed.returncode == 0, pushed.stdout + pushed.stderr
        done = real_doit(project, where, "build", "model=tiny", *([f"remote={url}"] if name == "two" else []))
        assert done.returncode == 0, done.stdout + done.stderr
        found = [line for line in done.stdout.splitlines() if line.startswith(("run ", "hit ", "remote hit ", "warn"))]
        assert len(found) == 6
        assert all(line.startswith(word) for line in found), done.stdout
        assert "The capital of France is Paris." in done.stdout
    made = [path for path in (tmp_path / "one" / "artifacts" / "packages").rglob("*") if path.is_file()]
    assert len(made) > 5
    for path in made:
        assert (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
def test_a_dead_remote_costs_one_warning(one: Path, workers: list[str]) -> None:
    words, log = build(one, *workers, MLCBUILD_REMOTE=DEAD)
    assert (words, log) == (["warn", *["run"] * 3], STEPS)


@pytest.mark.parametrize("args", [["--offline"], ["offline=1"]])
def test_offline_asks_nobody(one: Path, args: list[str]) -> None:
    assert build(one, *args, MLCBUILD_REMOTE=DEAD) == (["run"] * 3, STEPS)


def test_always_runs_and_tells_the_remote(url: str, one: Path, two: Path) -> None:
    build(one, f"remote={url}")
    assert build(two, "-a", f"remote={url}") == (["run"] * 3, STEPS)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (
            ["build", "remote=cache"],
            "remote=cache is not the URL of a cache\n  hint: http://host:port, https://host/prefix, file:///folder, "
            "s3://bucket/prefix or gs://bucket/prefix",
        ),
        (["build", "offline=maybe"], "offline=maybe is neither 1 nor 0\n  hint: doit build offline=1"),
        (["run", "build", "remote=x"], "remote=x is not the URL of a cache\n  hint: http://host:port, "),
    ],
)
def test_mistakes_exit_3(one: Path, args: list[str], text: str) -> None:
    done = doit(one, *args)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith(f"ERROR: {text}")
    assert take_log(one) == []
