"""What every test starts from: no setting of the person's shell, and nothing remembered from another test."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings named MLCBUILD_... would send tests to the person's own store or server."""
    for name in [name for name in os.environ if name.startswith("MLCBUILD_")]:
        monkeypatch.delenv(name)
