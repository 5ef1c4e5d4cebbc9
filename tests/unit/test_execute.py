"""Executing one action: current, restored, run; and what is left when it goes wrong. The steps are fakes."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mlcbuild.errors import StepError, StoreError, WeightError
from mlcbuild.graph import code
from mlcbuild.graph.action import PRIVATE, Action
from mlcbuild.graph.execute import execute, is_uptodate, remove_outputs, run_action
from mlcbuild.graph.settings import settings
from mlcbuild.graph.workspace import get_workspace

BIG = 200_000

STEPS = '''
"""Fake steps: each writes a line to the file in FAKE_LOG when it runs."""
import os, time
from mlcbuild.errors import WeightError

def log(text):
    with open(os.environ["FAKE_LOG"], "a") as file:
        file.write(text + "\\n")

def run(ctx):
    log("run " + ctx.params["what"])
    what = ctx.params["what"]
    folder = ctx.outputs["folder"]
    folder.mkdir()
    (folder / "copy.txt").write_text(ctx.inputs["source"].read_text() + str(ctx.params["bits"]))
    (folder / "big.bin").write_bytes(b"w" * 200_000)
    if what == "fail":
        raise WeightError("the shard is cut short", hint="download it again")
    if what == "crash":
        raise ZeroDivisionError("oops")
    if what == "full":
        raise OSError(28, "No space left on device")
    if what == "full compiler":
        raise RuntimeError("ld: cannot write: No space left on device")
    if what == "slow":
        time.sleep(1.0)
    if what == "stuck":
        time.sleep(60)
    if what != "half":
        ctx.outputs["note"].write_text(ctx.digest(folder / "copy.txt"))
'''


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A checkout with one source file, and a module of fake steps."""
    (tmp_path / "modules" / "fakesteps").mkdir(parents=True)
    (tmp_path / "modules" / "fakesteps" / "__init__.py").write_text("")
    (tmp_path / "modules" / "fakesteps" / "convert.py").write_text(STEPS)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setattr(code, "PACKAGES", ("fakesteps", "mlcbuild"))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("MLCBUILD_STORE", str(tmp_path / "store"))
    (tmp_path / "log").write_text("")
    make_checkout(tmp_path / "one")
    yield tmp_path / "one"
    get_workspace.cache_clear()
    for name in [name for name in sys.modules if name.startswith("fakesteps")]:
        del sys.modules[name]


def make_checkout(root: Path) -> Path:
    (root / "recipes").mkdir(parents=True)
    (root / "recipes" / "source.txt").write_text("source ")
    return root


def make_action(what: str = "good", bits: int = 4) -> Action:
    return Action(
        step="convert",
        name="tiny/q4",
        module="fakesteps.convert",
        params={"what": what, "bits": bits},
        inputs={"source": Path("recipes/source.txt")},
        outputs={"folder": Path("artifacts/weights/tiny"), "note": Path("artifacts/notes/tiny.txt")},
    )


def run(root: Path, what: str = "good", bits: int = 4) -> str:
    """Execute in a fresh process's state; the status."""
    get_workspace.cache_clear()
    return execute(make_action(what, bits), root).status


def get_runs(root: Path) -> int:
    return len((root.parent / "log").read_text().splitlines())


def get_note(root: Path) -> Path:
    return root / "artifacts" / "notes" / "tiny.txt"


def list_left(root: Path) -> list[str]:
    """What lies about: artifacts and scratch."""
    found = [path for path in (root / "artifacts").rglob("*") if path.is_file()]
    names = [path.relative_to(root / "artifacts").as_posix() for path in found]
    own = (".graph/lock", ".graph/digests", ".graph/results", ".graph/code.json")
    return sorted(name for name in names if not name.startswith(own))


def test_run_then_ok_then_hit(checkout: Path) -> None:
    assert run(checkout) == "run"
    assert (checkout / "artifacts/weights/tiny/copy.txt").read_text() == "source 4"
    assert run(checkout) == "ok"
    assert is_uptodate(make_action(), checkout)
    shutil.rmtree(checkout / "artifacts")
    assert not is_uptodate(make_action(), checkout)
    assert run(checkout) == "hit"
    assert (checkout / "artifacts/weights/tiny/big.bin").stat().st_size == BIG
    assert get_runs(checkout) == 1


def test_another_checkout_has_the_same_key_and_restores(checkout: Path) -> None:
    first = execute(make_action(), checkout)
    second = execute(make_action(), make_checkout(checkout.parent / "two" / "deeper"))
    assert (second.status, second.key) == ("hit", first.key)


def test_what_changes_runs_and_what_comes_back_hits(checkout: Path) -> None:
    assert run(checkout) == "run"
    assert run(checkout, bits=3) == "run"
    assert run(checkout, bits=4) == "hit"
    (checkout / "recipes" / "source.txt").write_text("other ")
    assert run(checkout) == "run"
    assert (checkout / "artifacts/weights/tiny/copy.txt").read_text() == "other 4"
    (checkout / "recipes" / "source.txt").write_text("source ")
    assert run(checkout) == "hit"


def test_code_and_tools_count(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    action = replace(make_action(), tools=("numpy", "no-such-tool"), environment=("FAKE_FLAG",))
    first = execute(action, checkout)
    made_of = get_workspace(checkout).results.get(action.task).made_of
    assert made_of["tools"]["no-such-tool"] == "absent"
    assert made_of["environment"] == {"FAKE_FLAG": None}
    assert set(made_of["code"]) == {"fakesteps.convert", "mlcbuild.errors"}
    monkeypatch.setenv("FAKE_FLAG", "1")
    assert execute(action, checkout).key != first.key


def test_code_that_is_not_python(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout.parent / "modules" / "fakesteps" / "helper.py").write_text("x = 1\ny = = 2\n")
    monkeypatch.chdir(checkout)
    action = replace(make_action(), code=("fakesteps.helper",))
    assert not is_uptodate(action, checkout)
    with pytest.raises(StepError) as caught:
        execute(action, checkout)
    assert str(caught.value) == "../modules/fakesteps/helper.py:2: invalid syntax\n  hint: mend it, and run it again"


def test_a_touched_or_changed_output_is_restored(checkout: Path) -> None:
    run(checkout)
    get_note(checkout).chmod(0o644)
    get_note(checkout).write_text("tampered")
    big = checkout / "artifacts/weights/tiny/big.bin"
    assert run(checkout) == "hit"
    assert get_note(checkout).read_text() != "tampered"
    big.chmod(0o644)
    big.write_bytes(b"v" * BIG)  # through the hard link this spoils the blob too
    assert run(checkout) == "run"
    assert big.read_bytes() == b"w" * BIG
    big.unlink()
    assert run(checkout) == "hit"


def test_a_folder_is_replaced_as_a_whole(checkout: Path) -> None:
    run(checkout)
    extra = checkout / "artifacts/weights/tiny/extra.txt"
    extra.write_text("mine")
    assert run(checkout) == "ok"
    run(checkout, bits=3)
    assert not extra.exists()


@pytest.mark.parametrize("what", ["fail", "crash", "half", "full"])
def test_a_failing_step_leaves_nothing(checkout: Path, what: str) -> None:
    with pytest.raises((WeightError, ZeroDivisionError, StepError, StoreError)):
        run(checkout, what)
    assert list_left(checkout) == []
    assert run(checkout) == "run"
    before = {name: (checkout / "artifacts" / name).read_bytes() for name in list_left(checkout)}
    with pytest.raises((WeightError, ZeroDivisionError, StepError, StoreError)):
        run(checkout, what)
    assert {name: (checkout / "artifacts" / name).read_bytes() for name in list_left(checkout)} == before


def test_the_messages(checkout: Path) -> None:
    with pytest.raises(StepError) as half:
        run(checkout, "half")
    assert str(half.value) == ("the step did not make its output 'note'\n  hint: write every path of ctx.outputs")
    for what in ("full", "full compiler"):
        with pytest.raises(StoreError) as full:
            run(checkout, what)
        assert str(full.value) == (
            "convert:tiny/q4: no space left on the disk\n"
            "  hint: free some space (`doit clean` removes built files) and run the same command again"
        )
    (checkout / "recipes" / "source.txt").unlink()
    with pytest.raises(StepError) as missing:
        execute(replace(make_action(), after=("download:tiny",)), checkout)
    assert str(missing.value) == (
        "convert:tiny/q4: its input recipes/source.txt does not exist\n  hint: doit download:tiny"
    )


@pytest.mark.parametrize("call", ["fsync", "link", "replace", "chmod"])
def test_a_disk_that_fills_up_while_storing(checkout: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        if call == "link":  # then a copy is tried, which needs space too
            patch.setattr(shutil, "copyfile", fail)
        with pytest.raises(StoreError, match="no space left on the disk"):
            run(checkout)
    assert list_left(checkout) == []
    assert [path for path in (checkout.parent / "store" / "scratch").iterdir()] == []
    assert run(checkout) == "run"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
def test_a_small_file_system(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = checkout.parent / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=150k", "tmpfs", small], check=False, capture_output=True
    ).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        make_checkout(small / "checkout")
        for store in (small / "store", checkout.parent / "store"):
            monkeypatch.setenv("MLCBUILD_STORE", str(store))
            with pytest.raises(StoreError, match="no space left on the disk"):
                run(small / "checkout")
            assert [path for path in (small / "checkout/artifacts").rglob("*") if path.stat().st_size > 50_000] == []
        subprocess.run(["mount", "-o", "remount,size=2m", small], check=True)
        assert run(small / "checkout") == "run"
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
def test_a_read_only_store(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = checkout.parent / "read only"
    store.mkdir()
    monkeypatch.setenv("MLCBUILD_STORE", str(store))
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", store], check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        assert run(checkout) == "run"
        subprocess.run(["mount", "-o", "remount,ro", store], check=True)
        assert run(checkout) == "ok"  # what is built needs no store
        with pytest.raises(StoreError) as caught:
            run(checkout, bits=3)
        assert str(caught.value) == (
            f"the content store {store} cannot be written: Read-only file system\n"
            "  hint: point MLCBUILD_STORE at a folder that you may write to, or unset it"
        )
        assert (checkout / "artifacts/weights/tiny/copy.txt").read_text() == "source 4"
        subprocess.run(["mount", "-o", "remount,rw", store], check=True)
        assert run(checkout, bits=3) == "run"
    finally:
        subprocess.run(["umount", store], check=True)


@pytest.mark.parametrize("damage", [b"", b"w" * (BIG // 2), b"w" * (BIG - 1) + b"v"], ids=["empty", "cut", "flipped"])
def test_a_damaged_blob_is_made_anew(checkout: Path, damage: bytes) -> None:
    """The output is gone and the blob is damaged: it is quarantined, and the step runs again."""
    run(checkout)
    (blob,) = [
        path for path in (checkout.parent / "store/cas").rglob("*") if path.is_file() and path.stat().st_size == BIG
    ]
    shutil.rmtree(checkout / "artifacts/weights")
    blob.chmod(0o644)
    blob.write_bytes(damage)
    assert run(checkout) == "run"
    assert [path.name for path in (checkout.parent / "store/quarantine").iterdir()] == [blob.name]
    assert (checkout / "artifacts/weights/tiny/big.bin").read_bytes() == blob.read_bytes() == b"w" * BIG


def test_doit_gets_a_failure_without_traceback(checkout: Path) -> None:
    from doit.exceptions import TaskFailed

    failed = run_action(make_action("fail"), checkout)
    assert isinstance(failed, TaskFailed)
    assert failed.message == "the shard is cut short\n  hint: download it again"
    with pytest.raises(ZeroDivisionError):
        run_action(make_action("crash"), checkout)
    assert run_action(make_action(), checkout)["status"] == "run"


def test_always_runs(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(checkout)
    monkeypatch.setattr(settings, "always", True)
    assert not is_uptodate(make_action(), checkout)
    assert run(checkout) == "run"
    assert get_runs(checkout) == 2


def test_clean_removes_outputs_but_not_the_store(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(checkout)
    remove_outputs(make_action(), checkout, dryrun=True)
    assert get_note(checkout).exists()
    remove_outputs(make_action(), checkout, dryrun=False)
    assert list_left(checkout) == []
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "remove artifacts/weights/tiny",
        "remove artifacts/notes/tiny.txt",
    ]
    assert run(checkout) == "hit"


def test_progress_reaches_the_reporter(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    module = checkout.parent / "modules" / "fakesteps" / "convert.py"
    module.write_text(module.read_text().replace('    log("run "', '    ctx.report("half way", 0.5)\n    log("run "'))
    monkeypatch.setattr(settings, "tell", lambda task, text, fraction: said.append(f"{task} {text} {fraction}"))
    run(checkout)
    assert said == ["convert:tiny/q4 half way 0.5"]


def run_in_child(root: Path, what: str, statuses: multiprocessing.Queue[str]) -> None:
    statuses.put(run(root, what))


def start(root: Path, what: str, statuses: multiprocessing.Queue[str]) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=run_in_child, args=(root, what, statuses))
    process.start()
    return process


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("same", [True, False])
def test_two_at_once_run_it_once(checkout: Path, same: bool) -> None:
    """On one checkout the second finds it current, on two with one store it takes over the result."""
    other = checkout if same else make_checkout(checkout.parent / "two")
    statuses: multiprocessing.Queue[str] = multiprocessing.get_context("fork").Queue()
    children = [start(root, "slow", statuses) for root in (checkout, other)]
    found = sorted(statuses.get(timeout=30) for _ in children)
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    assert found == sorted(["ok" if same else "hit", "run"])
    assert get_runs(checkout) == 1
    assert run(checkout, "slow") == "ok"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_kill_in_the_middle(checkout: Path) -> None:
    statuses: multiprocessing.Queue[str] = multiprocessing.get_context("fork").Queue()
    child = start(checkout, "stuck", statuses)
    deadline = time.monotonic() + 20
    while get_runs(checkout) == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join(30)
    assert not (checkout / "artifacts" / "weights").exists()
    assert (checkout / PRIVATE / "scratch").exists()
    assert run(checkout, "good") == "run"
    assert list((checkout / PRIVATE / "scratch").iterdir()) == []


def test_ctrl_c_leaves_nothing(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = checkout.parent / "modules" / "fakesteps" / "convert.py"
    module.write_text(module.read_text().replace('    if what == "slow"', "    raise KeyboardInterrupt\n    if what"))
    module.write_text(module.read_text().replace("    if what:", "    if False:"))
    with pytest.raises(KeyboardInterrupt):
        run(checkout)
    assert list_left(checkout) == []
