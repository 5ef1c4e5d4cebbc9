"""`doit explain` on the small project: exact texts, and nothing happens."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_project import VARIANT, doit, make_project, take_log

from mlcbuild.graph.changes import get_title, list_changes, show

WEIGHTS = "artifacts/weights/m-q4-rows16"
PACKAGE = f"artifacts/packages/{VARIANT.replace('/', '-')}"
NO_CHANGE = {"params": {}, "tools": {}, "environment": {}, "code": {}, "outputs": ["a"], "schema": 1}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "project")


@pytest.fixture
def built(project: Path) -> Path:
    done = doit(project, "build")
    assert done.returncode == 0, done.stdout + done.stderr
    take_log(project)
    return project


def explain(root: Path, *args: str, **settings: str) -> list[str]:
    """The lines of `doit explain`, blanks squeezed; it must run nothing and make no artifact."""
    before = sorted(path for path in (root / "artifacts").rglob("*") if ".graph" not in path.parts)
    done = doit(root, "explain", *args, **settings)
    assert (done.returncode, done.stderr) == (0, "")
    assert take_log(root) == []
    after = sorted(path for path in (root / "artifacts").rglob("*") if ".graph" not in path.parts)
    assert [path for path in after if "store" not in path.parts] == [p for p in before if "store" not in p.parts]
    return [" ".join(line.split()) for line in done.stdout.splitlines()]


def edit(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_before_the_first_build_everything_runs(project: Path) -> None:
    done = doit(project, "explain")
    assert done.stdout == (
        "run   convert   m/q4/rows16     not built here yet\n"
        f"run   package   {VARIANT}  not built here yet\n"
        f"run   verify    {VARIANT}  not built here yet\n"
        "0 ok, 0 hit, 3 run\n"
    )


def test_after_a_build_nothing_does(built: Path) -> None:
    assert explain(built) == [
        "ok convert m/q4/rows16",
        f"ok package {VARIANT}",
        f"ok verify {VARIANT}",
        "3 ok, 0 hit, 0 run",
    ]


@pytest.mark.parametrize(
    ("file", "old", "new", "reason"),
    [
        ("recipes/quantizations/q4.yaml", "bits: 4", "bits: 3", "bits 4 -> 3"),
        ("recipes/models/m/weights.txt", "5", "6", "recipes/models/m changed"),
        ("tasks/shared/maths.py", "2 * x", "7 * x", "tasks/shared/maths.py changed"),
        ("tasks/convert.py", '("numpy",)', '("numpy", "nosuch")', "nosuch now counts"),
        ("tasks/convert.py", "tools=", 'environment=("MORE",), tools=', "MORE now counts"),
    ],
)
def test_a_change_is_named_and_so_is_what_comes_after_it(
    built: Path, file: str, old: str, new: str, reason: str
) -> None:
    before = (built / file).read_text()
    edit(built / file, old, new)
    assert explain(built) == [
        f"run convert m/q4/rows16 {reason}",
        f"run package {VARIANT} after convert:m/q4/rows16, if that makes other files",
        f"run verify {VARIANT} after package:{VARIANT}, if that makes other files",
        "0 ok, 0 hit, 3 run",
    ]
    (built / file).write_text(before)
    assert explain(built)[-1] == "3 ok, 0 hit, 0 run"


def test_what_the_store_has_is_a_hit_and_what_follows_is_known(built: Path) -> None:
    edit(built / "recipes/quantizations/q4.yaml", "bits: 4", "bits: 3")
    assert doit(built, "build").returncode == 0
    assert take_log(built) == ["convert 3", "package", "verify"]
    edit(built / "recipes/quantizations/q4.yaml", "bits: 3", "bits: 4")
    assert explain(built) == [
        "hit convert m/q4/rows16 bits 3 -> 4",
        f"hit package {VARIANT} after convert:m/q4/rows16",
        f"hit verify {VARIANT} after package:{VARIANT}",
        "0 ok, 3 hit, 0 run",
    ]
    edit(built / "tasks/package.py", "12_345_678", "12_345_679")
    assert explain(built)[1:3] == [
        f"run package {VARIANT} tasks/package.py changed",
        "after convert:m/q4/rows16",
    ]
    edit(built / "tasks/package.py", "12_345_679", "12_345_678")
    done = doit(built, "build")
    assert [line.split()[0] for line in done.stdout.splitlines()[:3]] == ["hit"] * 3


def test_an_early_cutoff_shows_what_follows_as_ok(built: Path) -> None:
    """The edit makes the same files; once the store has them, what comes after is known to be current."""
    edit(built / "tasks/shared/maths.py", "2 * x", "x + x")
    assert explain(built)[0] == "run convert m/q4/rows16 tasks/shared/maths.py changed"
    assert doit(built, "build").returncode == 0
    assert take_log(built) == ["convert 4"]
    edit(built / "tasks/shared/maths.py", "x + x", "2 * x")
    assert explain(built) == [
        "hit convert m/q4/rows16 tasks/shared/maths.py changed",
        f"ok package {VARIANT}",
        f"ok verify {VARIANT}",
        "2 ok, 1 hit, 0 run",
    ]


def test_another_checkout_knows_that_all_is_in_the_store(project: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    assert doit(project, "build", MLCBUILD_STORE=store).returncode == 0
    other = make_project(tmp_path / "other")
    assert explain(other, MLCBUILD_STORE=store) == [
        "hit convert m/q4/rows16 not built here yet",
        f"hit package {VARIANT} not built here yet",
        f"hit verify {VARIANT} not built here yet",
        "0 ok, 3 hit, 0 run",
    ]


def test_damage_is_named(built: Path) -> None:
    (built / WEIGHTS / "w.txt").unlink()
    (built / PACKAGE / "manifest.json").chmod(0o644)
    (built / PACKAGE / "manifest.json").write_text("{}")
    assert explain(built)[:2] == [
        f"hit convert m/q4/rows16 {WEIGHTS}/w.txt is missing",
        f"hit package {VARIANT} {PACKAGE}/manifest.json changed",
    ]
    shutil.rmtree(built / "artifacts/store/cas")
    assert explain(built)[0] == f"run convert m/q4/rows16 {WEIGHTS}/w.txt is missing"


def test_variables_choose_and_mistakes_exit_3(built: Path) -> None:
    lines = explain(built, "quantization=q0,q4")
    assert lines[0] == "run convert m/q0/rows16 not built here yet"
    assert lines[-1] == "3 ok, 0 hit, 3 run"
    done = doit(built, "explain", "quantization=q5")
    assert (done.returncode, done.stderr) == (3, "ERROR: unknown quantization 'q5'\n  hint: did you mean q4 or q0?\n")


def test_the_words_of_changes() -> None:
    old = {
        **NO_CHANGE,
        "params": {"quantization": {"group_size": 32, "name": "a"}, "limits": {"max_batch": 8}, "seed": None, "x": 1},
        "tools": {"apache-tvm": "0.26.0", "program:nvcc": "12.8"},
        "environment": {"CUDA_HOME": None},
        "code": {"mlcbuild.models.llama": "1", "mlcbuild.graph": "1", "mlcbuild.gone": "1"},
    }
    new = {
        **NO_CHANGE,
        "params": {"quantization": {"group_size": 64, "name": "b"}, "limits": {"max_batch": 9}, "seed": 3, "y": ["z"]},
        "tools": {"apache-tvm": "0.27.0.post1", "program:nvcc": "12.9"},
        "environment": {"CUDA_HOME": "/usr/cuda"},
        "code": {"mlcbuild.models.llama": "2", "mlcbuild.graph": "2", "mlcbuild.weights.shards": "1"},
        "schema": 2,
    }
    assert list_changes(old, new) == [
        "group_size 32 -> 64",
        "quantization a -> b",
        "max_batch 8 -> 9",
        "seed none -> 3",
        "x 1 is gone",
        'y ["z"] is new',
        "apache-tvm 0.26.0 -> 0.27.0.post1",
        "nvcc 12.8 -> 12.9",
        "CUDA_HOME unset -> /usr/cuda",
        "mlcbuild/gone.py is no longer used",
        "mlcbuild/graph/__init__.py changed",
        "mlcbuild/models/llama.py changed",
        "mlcbuild/weights/shards.py is used now",
        "schema 1 -> 2",
    ]
    assert list_changes(new, new) == []
    assert get_title(("recipes", "model", "chat", "tool_format")) == "chat.tool_format"
    assert get_title(("recipes", "model", "name")) == "model"
    assert show("x" * 100) == "x" * 57 + "..."
