"""Packages that several tests look at: each is built once."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
from small_packages import build_package

from engine.artifact import Package


@pytest.fixture(scope="session")
def get_package(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Package]:
    """(case, quantization, target): see small_packages.build_package; its checkpoint is `source` beside the package."""

    @functools.cache
    def get(case: str, quantization: str, target: str) -> Package:
        return build_package(tmp_path_factory.mktemp("built"), case, quantization, target)

    return get
