"""`doit cache`: statistics, gc that removes only what nothing needs, verify that finds a flipped byte."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from small_project import VARIANT, doit, make_command, make_environment, make_project, take_log

from mlcbuild.graph import upkeep
from mlcbuild.graph.digest import DigestMemo
from mlcbuild.graph.results import ResultLog
from mlcbuild.graph.store import Store
from mlcbuild.graph.upkeep import DAY, GRACE, collect_garbage, list_checkouts, load_entries

PACKAGE = f"artifacts/packages/{VARIANT.replace('/', '-')}"
NOTHING = "removed 0 records, 0 files, 0 B\n"


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A project whose store has two generations: bits 3, which nothing needs any more, and bits 4."""
    root = make_project(tmp_path / "project")
    recipe = root / "recipes/quantizations/q4.yaml"
    text = recipe.read_text()
    for bits in (3, 4):
        recipe.write_text(text.replace("bits: 4", f"bits: {bits}"))
        done = doit(root, "build")
        assert done.returncode == 0, done.stdout + done.stderr
    take_log(root)
    return root


def open_store(root: Path) -> Store:
    return Store(root / "artifacts/store", DigestMemo(root / "memo"))


def make_old(store: Path, seconds: float) -> None:
    """Let every record have been used last so long ago."""
    for path in (store / "ac").iterdir():
        os.utime(path, (time.time() - seconds,) * 2)


def build(root: Path, *args: str, **settings: str) -> list[str]:
    """Build anew from the keys: the status of each step."""
    done = doit(root, "build", "--no-snapshot", *args, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split()[0] for line in done.stdout.splitlines()[:3]]


def test_stat_counts_by_step(built: Path) -> None:
    lines = doit(built, "cache", "stat").stdout.splitlines()
    assert lines[0] == str(built / "artifacts/store")
    assert lines[1].split() == ["step", "records", "size", "seconds"]
    assert [line.split()[:2] for line in lines[2:5]] == [["convert", "2"], ["package", "2"], ["verify", "2"]]
    assert lines[5].startswith("needed by a checkout or a pin: 100 kB; by nothing: ")


def test_gc_by_age_keeps_what_is_placed_here(built: Path) -> None:
    assert doit(built, "cache", "gc").stdout == NOTHING  # nothing is 30 days old
    make_old(built / "artifacts/store", 31 * DAY)
    kept = sorted(path.name for path in (built / "artifacts/store/ac").iterdir())
    done = doit(built, "cache", "gc", "-n")
    assert done.stdout == "would remove 3 records (1 convert, 1 package, 1 verify), 2 files, 112 B\n"
    assert sorted(path.name for path in (built / "artifacts/store/ac").iterdir()) == kept
    assert (
        doit(built, "cache", "gc", "age=4w").stdout
        == "removed 3 records (1 convert, 1 package, 1 verify), 2 files, 112 B\n"
    )
    shutil.rmtree(built / PACKAGE)
    shutil.rmtree(built / "artifacts/weights")
    assert build(built) == ["hit", "hit", "hit"]
    assert take_log(built) == []


def test_gc_by_size_removes_the_least_recently_used(built: Path) -> None:
    store = open_store(built)
    assert collect_garbage(store, None, 0, dryrun=False).blobs == 0  # all of it is young
    make_old(store.root, 2 * GRACE)
    assert collect_garbage(store, None, 10**9, dryrun=False).blobs == 0
    removal = collect_garbage(store, None, 0, dryrun=False)
    assert dict(removal.steps) == {"convert": 1, "package": 1, "verify": 1}
    assert all(entry.needed for entry in load_entries(store))
    assert build(built) == ["ok", "ok", "ok"]


def test_a_hit_makes_a_record_young(built: Path) -> None:
    make_old(built / "artifacts/store", 31 * DAY)
    shutil.rmtree(built / "artifacts/weights")
    assert build(built)[0] == "hit"
    ages = {entry.record.specification["step"]: time.time() - entry.used for entry in load_entries(open_store(built))}
    assert ages["convert"] < DAY < ages["verify"]


def test_checkouts_that_share_a_store_keep_theirs(tmp_path: Path) -> None:
    store, roots = tmp_path / "store", [make_project(tmp_path / name) for name in ("one", "two")]
    other = roots[1] / "recipes/quantizations/q4.yaml"
    other.write_text(other.read_text().replace("bits: 4", "bits: 3"))
    for root in roots:
        build(root, MLCBUILD_STORE=str(store))
    assert list_checkouts(store) == roots
    make_old(store, 31 * DAY)
    assert doit(roots[0], "cache", "gc", MLCBUILD_STORE=str(store)).stdout == NOTHING
    shutil.rmtree(roots[1])
    done = doit(roots[0], "cache", "gc", MLCBUILD_STORE=str(store))
    assert done.stdout.startswith("removed 3 records (1 convert, 1 package, 1 verify)")


def test_a_pinned_package_stays(built: Path) -> None:
    manifest = built / PACKAGE / "manifest.json"
    keys = [result.key for task, result in ResultLog(built).load_all() if task.startswith("convert:")]
    manifest.chmod(0o644)
    text = json.dumps({"actions": {"convert": {"key": keys[0]}}})
    manifest.write_text(text)
    done = doit(built, "cache", "pin", PACKAGE)
    assert (done.returncode, done.stderr.splitlines()[0]) == (3, f"ERROR: the store has no record of {PACKAGE}")
    package = built / "tasks/package.py"
    package.write_text(package.read_text().replace('"files":', f'"actions": {{"c": {{"key": "{keys[0]}"}}}}, "files":'))
    build(built)
    assert doit(built, "cache", "pin", PACKAGE).stdout == f"pinned {Path(PACKAGE).name}: 2 records\n"
    assert doit(built, "clean").returncode == 0
    make_old(built / "artifacts/store", 31 * DAY)
    doit(built, "cache", "gc")
    assert sorted(e.record.specification["step"] for e in load_entries(open_store(built))) == ["convert", "package"]
    assert doit(built, "cache", "unpin", PACKAGE).returncode == 0
    doit(built, "cache", "gc")
    assert load_entries(open_store(built)) == []


def test_blobs_of_unfinished_results_wait_for_an_hour(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(built)
    orphan = store.get_blob_path("ab" * 32)
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_text("half a result")
    assert collect_garbage(store, DAY, None, dryrun=False).blobs == 0
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + GRACE + 1)
    assert collect_garbage(store, DAY, None, dryrun=False).blobs == 1
    assert not orphan.exists()


def test_verify_finds_a_flipped_byte_and_the_next_build_mends_it(built: Path) -> None:
    assert doit(built, "cache", "verify").returncode == 0
    weights = built / "artifacts/weights/m-q4-rows16/big.bin"
    stat = weights.stat()
    weights.chmod(0o644)
    with open(weights, "r+b") as file:  # a hard link of the blob, unless the file system copies on write
        file.write(b"y")
    os.utime(weights, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    store = open_store(built)
    blob = next(b for e in load_entries(store) for b in e.blobs if b.path == "big.bin")
    path = store.get_blob_path(blob.sha256)
    linked = path.samefile(weights)
    if not linked:
        path.chmod(0o644)
        path.write_bytes(b"y" + b"x" * 99_999)
    assert build(built) == ["ok", "ok", "ok"]  # no stat shows it
    done = doit(built, "cache", "verify")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0].endswith(": damaged")
    assert lines[1] == f"{blob.sha256[:12]} is damaged (convert big.bin): moved to quarantine"
    if linked:
        assert lines[2] == "  shared by artifacts/weights/m-q4-rows16/big.bin: the next build makes it anew"
        assert build(built)[0] == "run"
    assert weights.read_bytes() == b"x" * 100_000
    assert doit(built, "cache", "verify").returncode == 0
    assert doit(built, "cache", "stat").stdout.splitlines()[-1] == "in quarantine: 1 files"


def test_gc_beside_builds_harms_none(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds that restore and run, while everything that nothing needs is removed again and again."""
    monkeypatch.setattr(upkeep, "GRACE", 2.0)
    removals, store, recipe = [], open_store(built), built / "recipes/quantizations/q4.yaml"
    text = recipe.read_text()
    for bits in (5, 6, 5, 4):
        recipe.write_text(text.replace("bits: 4", f"bits: {bits}"))
        building = subprocess.Popen(
            make_command("build", "-n", "2", "quantization=*"),
            cwd=built,
            env=make_environment(built),
            stderr=subprocess.PIPE,
        )
        while building.poll() is None:
            removals.append(collect_garbage(store, 0.0, None, dryrun=False).steps.total())
            time.sleep(0.01)
        assert building.communicate()[1] == b""
        assert building.returncode == 0
    assert sum(removals) > 0
    shutil.rmtree(built / "artifacts/weights")
    assert build(built, "quantization=*") == ["hit", "ok", "ok"]


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ([], "doit cache cannot ''\n  hint: doit cache stat|gc|verify|pin|unpin|pull|push"),
        (["gc", "age=3"], "age=3 is not an amount\n  hint: a number and h, d, w: 2d"),
        (["gc", "size=3"], "size=3 is not an amount\n  hint: a number and MB, GB, TB: 2GB"),
        (["gc", "agee=3d"], "unknown variable 'agee'\n  hint: did you mean age?"),
        (["pin"], "doit cache pin does not take 0 names\n  hint: doit cache pin PACKAGE"),
        (["pin", "x"], "x is not a package\n  hint: name a folder of artifacts/packages"),
        (["unpin", "x"], "x is not pinned\n  hint: pinned: nothing"),
    ],
)
def test_mistakes_exit_3(tmp_path: Path, args: list[str], text: str) -> None:
    done = doit(make_project(tmp_path / "project"), "cache", *args)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", f"ERROR: {text}\n")
