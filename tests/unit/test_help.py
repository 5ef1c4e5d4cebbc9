"""doit help TASK: everything that a task takes is shown."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from engine.server.settings import ChatSettings, ServerSettings, get_texts
from mlcbuild.graph.help import make_text

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("task", "kind"), [("serve", ServerSettings), ("chat", ChatSettings)])
def test_every_setting_is_shown(task: str, kind: type) -> None:
    doit = [sys.executable, "-m", "doit", "help", task]
    run = subprocess.run(doit, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")
    shown = " ".join(run.stdout.split())
    assert shown.startswith(f"{task} ")
    assert "from the environment (MLCBUILD_" in shown
    for name, text in get_texts(kind).items():
        assert f" {name} {text}" in shown
    assert all(len(line) <= 120 for line in run.stdout.splitlines())


def test_a_text() -> None:
    module = ModuleType("tasks.x", "x: does it.\n\nMore of it.\n")
    module.VARIABLES = {"a": "one", "long_name": "word " * 30}  # type: ignore[attr-defined]
    assert make_text(module) == (
        "\nMore of it.\n\nvariables (name=value):\n  a          one\n"
        f"  long_name  {('word ' * 21).strip()}\n             {('word ' * 9).strip()}\n\n"
        "besides those that select a variant: model, quantization, target, matrix, variant, source"
    )
    module = ModuleType("tasks.y", "y: does it.")
    module.VARIABLES = {"a": "one"}  # type: ignore[attr-defined]
    assert make_text(module).startswith("\nvariables (name=value):\n  a  one\n")
