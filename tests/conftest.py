"""What every test starts from: no setting of the person's shell, nothing remembered, and the embedded model built."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlcbuild.recipes.load import load_recipes
from mlcbuild.recipes.matrix import make_variants

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings named MLCBUILD_... would send tests to the person's own store or server."""
    for name in [name for name in os.environ if name.startswith("MLCBUILD_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def build_embedded() -> Callable[..., Path]:
    """(model, quantization): the package of an embedded model for this machine, built first where it is not."""
    return build


@pytest.fixture(scope="session")
def tiny_package() -> Path:
    """The embedded model for this machine."""
    return build("tiny")


@pytest.fixture(scope="session")
def draft_package() -> Path:
    """The one that guesses for it."""
    return build("tiny-draft")


def build(model: str, quantization: str = "q4f16_1") -> Path:
    """See build_embedded."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLCBUILD_")}
    variables = {"model": model, "quantization": quantization, "target": "cpu"}
    command = [sys.executable, "-m", "doit", "build", *(f"{name}={value}" for name, value in variables.items())]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    variant = make_variants(load_recipes(ROOT / "recipes"), variables)[0]
    return ROOT / "artifacts/packages" / variant.id.replace("/", "-")
