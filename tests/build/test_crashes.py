"""`kill -9` at any moment: no package that verifies wrongly, only running actions lost, and the next build goes on."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from chain_project import PACKAGES, load_artifacts, load_package, make_project
from forked_doit import Forge
from real_project import copy_project
from real_project import doit as run_real_doit
from small_project import make_command, take_log

from engine.artifact import open_package
from mlcbuild.graph.digest import DigestMemo
from mlcbuild.graph.store import Store

KILLS = 200


@pytest.fixture(scope="module")
def forge() -> Iterator[Forge]:
    with Forge() as forge:
        yield forge


def build(forge: Forge, root: Path, *args: str, **environment: str) -> None:
    done = forge.run(root, "build", *args, FAKE_LOG=str(root / "log"), **environment)
    assert done.code == 0, done.text


def check_store(root: Path) -> None:
    """Every record's blobs are there, and are what they are called."""
    store = Store(root / "artifacts/store", DigestMemo(root / "no memo"))
    for path in (store.root / "ac").iterdir():
        record = store.load_record(path.stem)
        assert record is not None, path
        for blob in (blob for output in record.outputs.values() for blob in output):
            assert hashlib.sha256(store.get_blob_path(blob.sha256).read_bytes()).hexdigest() == blob.sha256


def test_killed_at_two_hundred_moments(forge: Forge, tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    root = make_project(tmp_path / "project")
    weights = root / "recipes/models/m/weights.txt"
    kept: set[str] = set()  # actions whose end was shown: none of them may begin again
    kills = lost = 0
    while kills < KILLS:
        workers = chance.choice((1, 2))
        options = ("-n", "2") if workers == 2 else ()
        pid = forge.start(root, "build", *options, FAKE_LOG=str(root / "log"), FAKE_SLEEP="0.01")
        time.sleep(chance.uniform(0, 0.3))
        with contextlib.suppress(ProcessLookupError):  # it was quicker
            os.kill(pid, signal.SIGKILL)
        done = forge.wait(root)
        begun = [line.removeprefix("begin ") for line in take_log(root)]
        ended = [" ".join(line.split()[1:3]) for line in done.text.splitlines() if line.startswith("run ")]
        where = f"seed {seed}, kill {kills}"
        assert len(set(begun)) == len(begun), where
        assert not kept & set(begun), where
        assert len(set(begun) - set(ended)) <= workers, where
        kept.update(ended)
        lost += len(set(begun) - set(ended))
        for folder in (root / "artifacts/packages").glob("*"):
            load_package(folder)
        if done.code == 0:
            weights.write_text(str(chance.randrange(1, 10)))
            if chance.random() < 0.5:
                shutil.rmtree(root / "artifacts")
            for path in (root / "artifacts/store/ac").glob("*"):
                path.unlink()
            kept = set()
        else:
            assert done.code == -signal.SIGKILL, done.text
            kills += 1
            if kills % 10 == 0:
                check_store(root)
    assert lost > KILLS / 10, "hardly a kill met a running action"
    build(forge, root)
    clean = make_project(tmp_path / "clean")
    (clean / "recipes/models/m/weights.txt").write_text(weights.read_text())
    build(forge, clean)
    assert load_artifacts(root) == load_artifacts(clean)


def test_one_of_two_builds_is_killed(forge: Forge, tmp_path: Path) -> None:
    """The one that waits then makes all itself, on the same checkout and on another that shares the store."""
    for other in (tmp_path / "project", tmp_path / "other"):
        shutil.rmtree(tmp_path / "project", ignore_errors=True)
        project = make_project(tmp_path / "project")
        if other != project:
            make_project(other)
        settings = {"MLCBUILD_STORE": str(tmp_path / f"store of {other.name}")}
        pid = forge.start(project, "build", FAKE_LOG=str(project / "log"), FAKE_SLEEP="60", **settings)
        wait_for(project / "log", "begin")
        environment = {**os.environ, "FAKE_LOG": str(other / "second"), **settings}
        waiting = subprocess.Popen(make_command("build"), cwd=other, env=environment, stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(2)
        assert not (other / "second").exists()
        os.kill(pid, signal.SIGKILL)
        assert forge.wait(project).code == -signal.SIGKILL
        assert waiting.communicate(timeout=60)[0].count("run ") == 9
        assert waiting.returncode == 0
        for name in PACKAGES:
            assert load_package(other / "artifacts/packages" / name) is not None


def wait_for(path: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    while text not in path.read_text():
        assert time.monotonic() < deadline, f"{text} has not come to pass"
        time.sleep(0.02)


def test_the_real_build_of_tiny_is_killed(tmp_path: Path) -> None:
    """At moments spread over it; each build goes on from there, and the package is sound whenever there is one."""
    project, store = copy_project(tmp_path / "project"), tmp_path / "store"
    environment = {**os.environ, "PYTHONPATH": str(project), "MLCBUILD_STORE": str(store), "TVM_NUM_THREADS": "2"}
    shown: set[str] = set()
    for seconds in (1.0, 2.0, 3.0, 4.5, 6.0):
        with open(tmp_path / "said", "wb") as said:
            command = [sys.executable, "-m", "doit", "build", "-n", "2"]
            process = subprocess.Popen(command, cwd=project, env=environment, stdout=said, stderr=said)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            process.kill()
            process.wait()
        lines = (tmp_path / "said").read_text().splitlines()
        ran = {" ".join(line.split()[1:3]) for line in lines if line.startswith("run ")}
        assert not shown & ran
        shown |= ran
        for folder in (project / "artifacts/packages").glob("*"):
            if (folder / "manifest.json").exists():
                open_package(folder, verify=True)
    done = run_real_doit(project, store, "build")
    assert done.returncode == 0, done.stdout + done.stderr
    again = run_real_doit(project, store, "build", "--no-snapshot")
    assert [line.split()[0] for line in again.stdout.splitlines()[:-1]] == ["ok"] * 6
