"""One cold build of the real project, whose store the other tests with real builds share."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from real_project import copy_project, doit


@pytest.fixture(scope="session")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A content store, empty at first."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="session")
def first_build(
    tmp_path_factory: pytest.TempPathFactory, new_store: Path
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A copy of the project with tiny built by the default command before anything was in the store; what it said."""
    assert list(new_store.iterdir()) == []
    project = copy_project(tmp_path_factory.mktemp("project"))
    done = doit(project, new_store, "build")
    assert done.returncode == 0, done.stdout + done.stderr
    return project, done


@pytest.fixture(scope="session")
def store(new_store: Path, first_build: object) -> Path:
    """The store with what the first build has made: what tests share is built once."""
    return new_store
