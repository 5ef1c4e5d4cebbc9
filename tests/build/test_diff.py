"""`doit diff A B`: two packages compared in the recipes' words, exact texts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from small_project import doit, make_project

MADE_OF = {
    "step": "compile",
    "params": {"quantization": {"name": "q4", "group_size": 32}, "limits": {"max_batch": 8}},
    "inputs": {"config": "1"},
    "tools": {"apache-tvm": "0.26.0"},
    "environment": {},
    "code": {"mlcbuild.models.llama": "1"},
    "outputs": ["library"],
    "schema": 1,
}
MANIFEST: dict[str, Any] = {
    "schema": 1,
    "variant": "m/q4/x86-64-v3",
    "random": False,
    "recipes": {"quantization": {"name": "q4", "group_size": 32}, "model": {"source": {"revision": "aaa"}}},
    "source": {"revision": "aaa", "files": {"config.json": {"size": 10, "sha256": "1"}}},
    "actions": {"compile": {"key": "1", "made_of": MADE_OF}},
    "tools": {"apache-tvm": "0.26.0"},
    "library": {"abi": 1, "memory": {"embed": 100}},
    "licence": "MIT",
    "files": [{"path": "lib.so", "size": 120_000, "sha256": "1"}, {"path": "a.txt", "size": 5, "sha256": "2"}],
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = make_project(tmp_path / "project")
    other = copy.deepcopy(MANIFEST)
    other["variant"] = "m/q4/aarch64"
    for place in (other["recipes"], other["actions"]["compile"]["made_of"]["params"]):
        place["quantization"]["group_size"] = 64
    other["recipes"]["model"]["source"]["revision"] = other["source"]["revision"] = "bbb"
    other["source"]["files"]["config.json"]["sha256"] = "9"
    other["actions"]["compile"]["made_of"]["tools"]["apache-tvm"] = "0.27.0.post1"
    other["actions"]["compile"]["made_of"]["code"]["mlcbuild.models.llama"] = "2"
    other["actions"]["compile"]["made_of"]["inputs"]["config"] = "2"
    other["actions"]["convert"] = {"key": "2", "made_of": MADE_OF}
    other["library"]["memory"]["embed"] = 200
    other["files"] = [{"path": "lib.so", "size": 131_000, "sha256": "3"}, {"path": "b.txt", "size": 5, "sha256": "2"}]
    for name, manifest in (("m-q4-x86-64-v3", MANIFEST), ("m-q4-aarch64", other)):
        folder = root / "artifacts" / "packages" / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return root


def test_every_difference_is_named_once(project: Path) -> None:
    done = doit(project, "diff", "m/q4/x86-64-v3", "artifacts/packages/m-q4-aarch64")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines() == [
        "variant   m/q4/x86-64-v3 -> m/q4/aarch64",
        "recipes   group_size 32 -> 64",
        "          source.revision aaa -> bbb",
        "source    config.json changed, 10 B",
        "compile   apache-tvm 0.26.0 -> 0.27.0.post1",
        "          mlcbuild/models/llama.py changed",
        "          its config changed",
        "convert   only in the second",
        "library   memory.embed 100 -> 200",
        "files     a.txt is only in the first",
        "          b.txt is only in the second",
        "          lib.so changed, 120 kB -> 131 kB",
    ]


def test_a_package_is_the_same_as_itself_by_any_name(project: Path) -> None:
    folder = project / "artifacts" / "packages" / "m-q4-aarch64"
    for name in ("m/q4/aarch64", "m-q4-aarch64", str(folder), str(folder / "manifest.json")):
        done = doit(project, "diff", name, "m/q4/aarch64")
        assert (done.returncode, done.stdout) == (0, "the same: m/q4/aarch64, 2 files\n")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["m"], "doit diff takes two packages, not 1\n  hint: doit diff A B"),
        (
            ["m/q4/aarch64", "m/q5/aarch64"],
            "'m/q5/aarch64' is neither a package nor a manifest.json\n  hint: here are: m-q4-aarch64, m-q4-x86-64-v3",
        ),
        (
            ["m/q4/aarch64", "manifest.json"],
            "manifest.json is not a manifest of mlcbuild\n  hint: name a package that doit build has made",
        ),
    ],
)
def test_mistakes_exit_3(project: Path, args: list[str], text: str) -> None:
    (project / "manifest.json").write_text('{"files": []}')
    done = doit(project, "diff", *args)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", f"ERROR: {text}\n")
