"""How many cores are ours: affinity, hardware threads of one core, and the control group's quota; how busy they are."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from engine import machine


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight hardware threads: cores 0-3, each with another thread 4-7; no quota."""
    for cpu in range(8):
        folder = tmp_path / f"cpus/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "core_cpus_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    (tmp_path / "cgroup/cpu").mkdir(parents=True)
    monkeypatch.setattr(machine, "CPUS", tmp_path / "cpus")
    monkeypatch.setattr(machine, "CGROUP", tmp_path / "cgroup")
    return tmp_path


@pytest.mark.parametrize(
    ("mine", "cores"),
    [(range(8), 4), ({0, 4}, 1), ({1, 2, 6}, 2), ({9, 10}, 2)],
    ids=["all", "one", "three", "unknown"],
)
def test_hardware_threads_of_one_core_count_once(
    root: Path, monkeypatch: pytest.MonkeyPatch, mine: set[int], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(mine))
    assert machine.count_cores() == cores


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 4)],
)
def test_quota_of_version_two(root: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    (root / "cgroup/cpu.max").write_text(quota + "\n")
    assert machine.count_cores() == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", 4), ("300000", 3)])
def test_quota_of_version_one(root: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    (root / "cgroup/cpu/cpu.cfs_quota_us").write_text(quota + "\n")
    (root / "cgroup/cpu/cpu.cfs_period_us").write_text("100000\n")
    assert machine.count_cores() == cores


def test_systems_without_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.count_cores() == 1


def test_busy_seconds_of_this_process_grow() -> None:
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("no /proc/stat here")
    before, start = machine.get_busy_seconds(), time.process_time()
    while machine.get_busy_seconds() < before + 0.1:
        assert time.process_time() < start + 10, "what this process does is not seen"


def test_busy_seconds_of_systems_that_do_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    assert machine.get_busy_seconds() == 0
