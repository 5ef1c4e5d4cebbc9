"""Bad input, as a user meets it: one clear message with a hint, a failing exit, nothing half-written, and then success.

Every case breaks a copy of the real project, looks at what `doit build` says, mends it and builds again.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
from real_project import copy_project, doit
from safetensors.numpy import load_file, save_file

VARIANT = ("quantization=q0f32", "target=x86-64-v3")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return copy_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def project(pristine, tmp_path):
    """A project of its own for each case."""
    return shutil.copytree(pristine, tmp_path / "project")


def check_refused(project, store, *needles: str, code: int = 1, args=VARIANT, **environment: str) -> None:
    """The build fails with that exit code, one message with a hint and no traceback, and leaves no package."""
    done = doit(project, store, "build", *args, **environment)
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    for needle in needles:
        assert needle in said
    assert any(word in said for word in ("hint: ", "did you mean", "first on line")), said
    assert "Traceback" not in said
    assert not list(project.glob("artifacts/packages/*"))
    assert not [p for p in project.glob("artifacts/**/*") if ".tmp" in p.name or "scratch" in p.name and p.is_file()]


def check_builds(project, store, *args: str) -> None:
    done = doit(project, store, "build", *(args or VARIANT))
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(project.glob("artifacts/packages/*/record.json"))


def check_makes(project, store, step: str, made: str) -> None:
    """Where the store is the case's own, the step that was refused and what it needs have to do: no package."""
    done = doit(project, store, f"{step}:tiny/q0f32/x86-64-v3", *VARIANT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(project.glob(made))


def get_weights(project: Path) -> Path:
    return project / "recipes" / "models" / "tiny" / "model.safetensors"


def test_missing_safetensors(project, store):
    good = get_weights(project).read_bytes()
    get_weights(project).unlink()
    check_refused(project, store, "safetensors")
    get_weights(project).write_bytes(good)
    check_builds(project, store)


@pytest.mark.parametrize("damage", ["header", "short"])
def test_damaged_safetensors(project, store, damage):
    good = get_weights(project).read_bytes()
    get_weights(project).write_bytes(b"\xff" * 64 + good[64:] if damage == "header" else good[: len(good) // 2])
    check_refused(project, store, "model.safetensors")
    get_weights(project).write_bytes(good)
    check_builds(project, store)


def test_a_tensor_of_another_shape_or_name(project, store):
    good, tensors = get_weights(project).read_bytes(), load_file(get_weights(project))
    wrong = {**tensors, "model.norm.weight": np.zeros(255, tensors["model.norm.weight"].dtype)}
    wrong["surprise"] = wrong.pop("model.layers.0.mlp.up_proj.weight")
    save_file(wrong, get_weights(project))
    check_refused(project, store, "model.norm.weight has shape [255]", "up_proj.weight", "surprise")
    get_weights(project).write_bytes(good)
    check_builds(project, store)


def test_unknown_family(project, store):
    recipe = project / "recipes" / "models" / "tiny.yaml"
    good = recipe.read_text()
    recipe.write_text(good.replace("family: llama", "family: lama").replace("model_type: llama", "model_type: lama"))
    check_refused(project, store, "lama", "llama", code=3)
    recipe.write_text(good)
    check_builds(project, store)


@pytest.mark.parametrize("line", ["\tlicence: MIT\n", "licence: MIT\n", "licens: MIT\n"], ids=["tab", "twice", "typo"])
def test_broken_recipe(project, store, line):
    recipe = project / "recipes" / "models" / "tiny.yaml"
    good = recipe.read_text()
    recipe.write_text(good + line)
    number = len(good.splitlines()) + 1
    check_refused(project, store, f"recipes/models/tiny.yaml:{number}:1: ", "^", code=3)
    recipe.write_text(good)
    check_builds(project, store)


def test_no_compiler(project, tmp_path):
    """PATH holds nothing but the programs of a bare system: no cc."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("env", "git", "sh", "uname"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    store = tmp_path / "store"
    check_refused(project, store, "needs 'cc', which is not on PATH", "apt-get install gcc", PATH=str(tools))
    check_makes(project, store, "compile", "artifacts/libs/*/lib.so")


def test_full_disk(project, tmp_path):
    """A tmpfs too small for the weights holds artifacts/ and the store."""
    disk = project / "artifacts"
    shutil.rmtree(disk, ignore_errors=True)
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], check=False).returncode
    if mounted:
        pytest.skip("this user cannot mount a tmpfs")
    try:
        check_refused(project, disk / "store", "space")
        subprocess.run(["mount", "-o", "remount,size=300m", str(disk)], check=True)
        check_makes(project, disk / "store", "package", "artifacts/packages/*/manifest.json")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_unknown_value_names_the_nearest(project, store):
    check_refused(project, store, "unknown quantization 'q4f16_2'", "q4f16_1", code=3, args=("quantization=q4f16_2",))
    check_refused(project, store, "unknown variable 'modle'", "model", code=3, args=("modle=tiny",))


def test_port_in_use(project, store):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = doit(project, store, "serve", f"port={port}", *VARIANT)
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert str(port) in said
    assert "in use" in said
    assert "hint: " in said
    assert "Traceback" not in said


def test_unreadable_store(project, tmp_path):
    """The store's place is a file."""
    (tmp_path / "file").write_text("")
    check_refused(project, tmp_path / "file", "store")
    assert os.path.isfile(tmp_path / "file")
