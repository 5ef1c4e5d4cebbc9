"""`doit build matrix=...` on a machine that lacks a toolchain: the rest is built, what is skipped is listed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from small_project import VARIANT, doit, make_project, take_log

PACKAGE = f"artifacts/packages/{VARIANT.replace('/', '-')}"
SKIP = "skip  m/q4/other  this machine has no nosuch-cc"
MATRIX = "axes: {model: [m], quantization: [q4], target: [x86-64-v3, other]}\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = make_project(tmp_path / "project")
    target = (root / "recipes/targets/x86-64-v3.yaml").read_text()
    files = {"targets/other.yaml": f"{target}toolchain: [sh, nosuch-cc]\n", "matrices/nightly.yaml": MATRIX}
    for name, text in files.items():
        (root / "recipes" / name).write_text(text)
        os.utime(root / "recipes" / name, (1_700_000_000, 1_700_000_000))
    return root


def test_what_fits_is_built_and_the_rest_is_listed(project: Path) -> None:
    done = doit(project, "build", "matrix=nightly", "--report", "out.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert take_log(project) == ["convert 4", "package", "verify"]
    assert done.stdout.splitlines()[-1] == SKIP
    report = json.loads((project / "out.json").read_text())
    assert report["skipped"] == [{"variant": "m/q4/other", "reason": "this machine has no nosuch-cc"}]
    assert doit(project, "build", "matrix=nightly").stdout == f"up to date: 1 package ({PACKAGE})\n{SKIP}\n"
    assert doit(project, "explain", "matrix=nightly").stdout.splitlines()[-2:] == ["3 ok, 0 hit, 0 run", SKIP]


def test_what_cannot_be_is_listed(project: Path) -> None:
    """A quantization that needs what a target does not provide: left out of a matrix, an error where it is named."""
    for name, line in (("quantizations/q4.yaml", "needs: [fp8]"), ("targets/x86-64-v3.yaml", "provides: [fp8]")):
        path = project / "recipes" / name
        path.write_text(f"{path.read_text()}{line}\n")
    done = doit(project, "build", "matrix=nightly")
    assert done.returncode == 0, done.stdout + done.stderr
    assert take_log(project) == ["convert 4", "package", "verify"]
    reason = "quantization q4 needs fp8, which target other does not provide"
    assert done.stdout.splitlines()[-1] == f"skip  m/q4/other  {reason}"
    done = doit(project, "build", "target=*")
    assert done.stdout.splitlines()[-1] == f"skip  m/q4/other  {reason}"
    for args in (["target=other"], ["matrix=nightly", "target=other"], ["variant=m/q4/other"]):
        done = doit(project, "build", *args)
        assert (done.returncode, done.stdout) == (3, "")
        error = f"ERROR: m/q4/other cannot be built: {reason}\n  hint: name another target or quantization\n"
        assert done.stderr == error


def test_a_new_program_ends_the_snapshot(project: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    path = f"{os.environ['PATH']}:{tmp_path / 'bin'}"
    assert doit(project, "build", "matrix=nightly", PATH=path).returncode == 0
    assert doit(project, "build", "matrix=nightly", PATH=path).stdout.endswith(f"({PACKAGE})\n{SKIP}\n")
    (tmp_path / "bin" / "nosuch-cc").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "nosuch-cc").chmod(0o755)
    done = doit(project, "build", "matrix=nightly", PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skip" not in done.stdout
    assert "hit   package   m/q4/other" in done.stdout  # the same as the first, but for its name


def test_what_is_named_is_not_skipped(project: Path) -> None:
    """Its compiler would say what is missing; this project has none, so that it is built."""
    named = ["matrix=nightly", "variant=m/q4/x86-64-v3,m/q4/other"]
    for args in (["target=other"], ["matrix=nightly", "target=other"], named):
        done = doit(project, "build", *args)
        assert done.returncode == 0
        assert "skip" not in done.stdout
