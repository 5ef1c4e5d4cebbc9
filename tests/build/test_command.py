"""`doit build` and its neighbours, as a user types them, on a small project of fake steps."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from small_project import VARIANT, doit, make_command, make_environment, make_project, take_log

PACKAGE = f"artifacts/packages/{VARIANT.replace('/', '-')}"
UP_TO_DATE = f"up to date: 1 package ({PACKAGE})\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "project")


@pytest.fixture
def built(project: Path) -> Path:
    """The project after its first build."""
    done = doit(project, "build")
    assert done.returncode == 0, done.stdout + done.stderr
    assert take_log(project) == ["convert 4", "package", "verify"]
    return project


def edit(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def build(root: Path, *args: str, **settings: str) -> list[str]:
    """Build, and return the steps that have run."""
    done = doit(root, "build", *args, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return take_log(root)


def test_the_first_build_shows_steps_table_and_reply(project: Path) -> None:
    done = doit(project, "build")
    assert done.returncode == 0
    assert done.stderr == ""
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    assert [line.rpartition("  ")[0] for line in lines[:3]] == [
        "run   convert   m/q4/rows16",
        f"run   package   {VARIANT}",
        f"run   verify    {VARIANT}",
    ]
    assert lines[4].split() == ["variant", "package", "size", "KL", "top-1", "tokens/s"]
    assert lines[5].split() == [VARIANT, PACKAGE, "12.3", "MB", "0.0125", "97.5%", "61.5"]
    assert lines[-2:] == ["> Hello?", "Here I am."]


def test_the_second_build_does_nothing_and_is_quick(built: Path) -> None:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = doit(built, "build")
        seconds.append(time.perf_counter() - started)
        assert (done.returncode, done.stdout, done.stderr) == (0, UP_TO_DATE, "")
    assert take_log(built) == []
    assert min(seconds) < 0.5 or os.getloadavg()[0] > 2 * (os.cpu_count() or 1), seconds


def test_the_quick_way_reads_neither_dodo_nor_recipes(built: Path) -> None:
    script = (
        "import sys; sys.argv = ['doit', 'build'];"
        "from doit.doit_cmd import DoitMain; code = DoitMain().run(['build']);"
        "print(code, sorted({'dodo', 'yaml', 'pydantic', 'numpy', 'rich', 'filelock'} & set(sys.modules)))"
    )
    command = [make_command()[0], "-c", script]
    done = subprocess.run(command, cwd=built, capture_output=True, text=True, check=True)
    assert done.stdout == f"{UP_TO_DATE}0 []\n"


def test_without_the_snapshot_the_keys_decide_the_same(built: Path) -> None:
    done = doit(built, "build", "--no-snapshot")
    assert done.stdout.splitlines() == [
        "ok    convert   m/q4/rows16",
        f"ok    package   {VARIANT}",
        f"ok    verify    {VARIANT}",
        UP_TO_DATE.strip(),
    ]
    shutil.rmtree(built / "artifacts" / ".graph" / "snapshots")
    (built / "artifacts" / ".graph" / "doit.json").write_text('{"cut sho')
    assert build(built) == []
    assert doit(built, "build").stdout == UP_TO_DATE


def test_another_checkout_restores_everything(project: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    assert build(project, MLCBUILD_STORE=store) == ["convert 4", "package", "verify"]
    other = make_project(tmp_path / "elsewhere" / "deeper")
    done = doit(other, "build", MLCBUILD_STORE=store)
    assert [line.split()[0] for line in done.stdout.splitlines()[:3]] == ["hit"] * 3
    assert take_log(other) == []
    assert (other / PACKAGE / "record.json").read_bytes() == (project / PACKAGE / "record.json").read_bytes()


@pytest.mark.parametrize(
    ("file", "old", "new", "steps"),
    [
        ("tasks/convert.py", "# a comment", "# another\n    '''and a text'''", []),
        ("tasks/shared/maths.py", "return 3 * x", "return 4 * x", []),
        ("recipes/models/m.yaml", "limits", "description: other words\nlimits", []),
        ("dodo.py", '"""doit', '"""Well: doit', []),
        ("tasks/shared/maths.py", "return 2 * x", "return x + x", ["convert 4"]),  # the outputs stay: early cutoff
        ("tasks/shared/maths.py", "return 2 * x", "return 7 * x", ["convert 4", "package", "verify"]),
        ("recipes/quantizations/q4.yaml", "bits: 4", "bits: 3", ["convert 3", "package", "verify"]),
        ("recipes/models/m/weights.txt", "5", "6", ["convert 4", "package", "verify"]),
        ("tasks/package.py", "12_345_678", "12_345_679", ["package", "verify"]),
        ("tasks/verify.py", "0.0125", "0.0126", ["verify"]),
    ],
)
def test_an_edit_runs_what_it_touches(built: Path, file: str, old: str, new: str, steps: list[str]) -> None:
    before = (built / file).read_text()
    edit(built / file, old, new)
    assert build(built) == steps
    assert build(built) == []
    (built / file).write_text(before)
    assert build(built) == []


def test_a_new_file_of_an_input_folder_counts(built: Path) -> None:
    (built / "recipes" / "models" / "m" / "more.txt").write_text("")
    assert build(built) == ["convert 4"]


def test_what_was_tampered_with_is_restored(built: Path) -> None:
    weights = built / "artifacts/weights/m-q4-rows16/w.txt"
    weights.chmod(0o644)
    weights.write_text("tampered")
    manifest = built / PACKAGE / "manifest.json"
    manifest.unlink()
    done = doit(built, "build")
    assert done.returncode == 0
    assert [line.split()[:2] for line in done.stdout.splitlines()[:3]] == [
        ["hit", "convert"],
        ["hit", "package"],
        ["hit", "verify"],
    ]
    assert take_log(built) == []
    assert weights.read_text() == "14"


def test_variables_take_lists_and_globs(project: Path) -> None:
    done = doit(project, "build", "quantization=q0,q4")
    assert done.returncode == 0
    assert take_log(project) == ["convert 32", "package", "verify", "convert 4", "package", "verify"]
    done = doit(project, "build", "quantization=q*")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["ok"] * 6 + ["up"]
    assert doit(project, "build", "quantization=q*").stdout == "up to date: 2 packages (artifacts/packages/...)\n"


def test_several_at_once(project: Path) -> None:
    """-n 2: actions are sent to worker processes, and the reporter hears of all of them."""
    done = doit(project, "build", "-n", "2", "quantization=*")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(line.startswith("run ") for line in done.stdout.splitlines()) == 6
    assert sorted(take_log(project)) == ["convert 32", "convert 4", "package", "package", "verify", "verify"]
    assert build(project, "quantization=*") == []


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["build", "modle=m"], "unknown variable 'modle'\n  hint: did you mean model?"),
        (
            ["build", "port=1"],
            "unknown variable 'port'\n  hint: known: matrix, model, quantization, source, target, variant",
        ),
        (["build", "model=mm"], "unknown model 'mm'\n  hint: did you mean m?"),
        (["build", "quantization=q5"], "unknown quantization 'q5'\n  hint: did you mean q4 or q0?"),
        (["build", "model="], "model= names nothing\n  hint: give a name, a comma list or a glob, e.g. model='*'"),
        (["build", "matrix=nightly"], "unknown matrix 'nightly'\n  hint: known: default"),
        (["build", "convert:x"], "doit build takes variables, not tasks: convert:x\n  hint: doit run convert:x"),
        (["serve", "modle=x"], "unknown variable 'modle'\n  hint: did you mean model or remote or offline?"),
        (["serve", "prt=1"], "unknown variable 'prt'\n  hint: did you mean port?"),
        (["list", "model=x"], "unknown model 'x'\n  hint: known: m"),
    ],
)
def test_mistakes_on_the_command_line_exit_3(project: Path, args: list[str], text: str) -> None:
    done = doit(project, *args)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", f"ERROR: {text}\n")
    assert not (project / "artifacts" / "packages").exists()


def test_a_broken_recipe_exits_3(project: Path) -> None:
    edit(project / "recipes/quantizations/q4.yaml", "bits: 4", "bits: four")
    done = doit(project, "build")
    assert done.returncode == 3
    assert done.stderr.startswith("ERROR: ")
    assert "recipes/quantizations/q4.yaml:2:7" in done.stderr
    assert "Traceback" not in done.stderr


def test_outside_a_project(tmp_path: Path) -> None:
    done = doit(tmp_path, "build")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == (
        f"ERROR: there is no dodo.py in {tmp_path}\n"
        "  hint: cd into a checkout of mlcbuild, which has one beside its recipes/ and tasks/\n"
    )
    assert "doit build" in doit(tmp_path, "help").stdout
    assert "model=NAMES" in doit(tmp_path, "help", "build").stdout


@pytest.mark.parametrize(("how", "code"), [("mend", 1), ("bug", 2)])
def test_a_failing_step_leaves_nothing(project: Path, how: str, code: int) -> None:
    done = doit(project, "build", FAKE_FAIL=how)
    assert done.returncode == code
    text = done.stdout + done.stderr
    assert "fail  convert m/q4/rows16" in text
    assert "what the step prints" in text
    if how == "mend":
        assert "shard 3 is cut short\n  hint: doit download:m\n" in text
        assert "Traceback" not in text
    else:
        assert "Traceback" in text
        assert "ZeroDivisionError: a bug" in text
    assert not (project / "artifacts" / "weights").exists()
    assert list((project / "artifacts" / ".graph" / "scratch").iterdir()) == []
    take_log(project)
    assert build(project) == ["convert 4", "package", "verify"]


def test_the_report(project: Path) -> None:
    build(project, "--report", "out.json")
    report = json.loads((project / "out.json").read_text())
    assert report["exit_code"] == 0
    assert [(step["step"], step["status"]) for step in report["steps"]] == [
        ("convert", "run"),
        ("package", "run"),
        ("verify", "run"),
    ]
    assert report["packages"][0]["kl"] == 0.0125
    doit(project, "build", "-a", "--report", "out.json", FAKE_FAIL="mend")
    report = json.loads((project / "out.json").read_text())
    assert (report["exit_code"], report["steps"][0]["status"], report["packages"]) == (1, "fail", [])


def test_always_runs_everything(built: Path) -> None:
    assert build(built, "-a") == ["convert 4", "package", "verify"]
    assert build(built) == []


def test_doits_own_commands(built: Path) -> None:
    done = doit(built, "list", "--all", "-s")
    listed = dict(reversed(line.split()[:2]) for line in done.stdout.splitlines())
    assert listed[f"build:{VARIANT}"] == "U"
    assert listed["build:m/q0/x86-64-v3"] == "R"
    assert listed["convert:m/q4/rows16"] == "U"
    done = doit(built, "info", f"build:{VARIANT}")
    assert done.returncode == 0
    assert f"verify:{VARIANT}" in done.stdout
    done = doit(built)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["ok"] * 3
    done = doit(built, "serve", "port=8000")
    assert done.stdout.splitlines()[-1] == f"serving {Path(PACKAGE).name} 8000"


def test_clean_removes_what_was_built(built: Path) -> None:
    done = doit(built, "clean", "-n")
    assert f"remove {PACKAGE}" in done.stdout
    assert (built / PACKAGE / "manifest.json").exists()
    done = doit(built, "clean")
    assert done.returncode == 0
    assert not (built / PACKAGE).exists()
    assert not (built / "artifacts/weights/m-q4-rows16").exists()
    done = doit(built, "build")
    assert [line.split()[0] for line in done.stdout.splitlines()[:3]] == ["hit"] * 3


def start(root: Path, *args: str, **settings: str) -> subprocess.Popen[str]:
    environment = make_environment(root, **settings)
    return subprocess.Popen(
        make_command("build", *args),
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_log(root: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    while text not in (root / "log").read_text():
        assert time.monotonic() < deadline, "the step has not begun"
        time.sleep(0.02)


@pytest.mark.parametrize("checkouts", [1, 2])
def test_two_builds_at_once(project: Path, tmp_path: Path, checkouts: int) -> None:
    """On one checkout, and on two that share a store: each step runs once, and both end well."""
    other = project if checkouts == 1 else make_project(tmp_path / "two")
    settings = {"MLCBUILD_STORE": str(tmp_path / "store"), "FAKE_SLEEP": "1", "FAKE_LOG": str(project / "log")}
    running = [start(root, **settings) for root in (project, other)]
    for process in running:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, out + err
    assert sorted(take_log(project)) == ["convert 4", "package", "verify"]
    for root in (project, other):
        assert build(root, MLCBUILD_STORE=settings["MLCBUILD_STORE"]) == []


@pytest.mark.parametrize(
    ("number", "text"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated"), (signal.SIGKILL, "")]
)
def test_interrupted_builds_go_on_where_they_were(built: Path, number: signal.Signals, text: str) -> None:
    """The q4 variant is built; a build of both is stopped in the middle of the other."""
    process = start(built, "quantization=*", FAKE_SLEEP="60")
    wait_for_log(built, "convert 32")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Traceback" not in out + err
    if text:
        assert process.returncode == 130
        assert f"{text}: finished steps are kept, the same command goes on from here" in err
    assert not (built / "artifacts/weights/m-q0-rows16").exists()
    take_log(built)
    assert build(built) == []
    assert build(built, "quantization=*") == ["convert 32", "package", "verify"]


def test_a_build_killed_again_and_again_ends_right(project: Path, tmp_path: Path) -> None:
    """Kill -9 at moments spread over a whole build."""
    for tenths in range(2, 18, 3):
        process = start(project, "quantization=*", FAKE_SLEEP="0.2")
        time.sleep(tenths / 10)
        process.kill()
        process.communicate(timeout=60)
    assert doit(project, "build", "quantization=*").returncode == 0
    clean = make_project(tmp_path / "clean")
    assert doit(clean, "build", "quantization=*").returncode == 0
    for path in (clean / "artifacts").rglob("*"):
        name = path.relative_to(clean)
        if path.is_file() and ".graph" not in name.parts and "store" not in name.parts:
            assert (project / name).read_bytes() == path.read_bytes(), name
