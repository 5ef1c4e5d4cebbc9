"""What this machine is, for those who ask whether a package runs here. Standard library only."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
CGROUP = Path("/sys/fs/cgroup")


def count_cores() -> int:
    """Cores that this process may use: those of its affinity, hardware threads of one core counted once, and no more
    than its control group has time for."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = {_read(CPUS / f"cpu{cpu}/topology/core_cpus_list") or str(cpu) for cpu in os.sched_getaffinity(0)}
    quota = _get_quota()
    return len(cores) if quota is None else max(1, min(len(cores), int(quota)))


def get_busy_seconds() -> float:
    """What the cores that this process may use have worked so far, for anybody; 0 where the system does not tell."""
    if not hasattr(os, "sched_getaffinity"):
        return 0.0
    names, total = {f"cpu{cpu}" for cpu in os.sched_getaffinity(0)}, 0
    for line in (_read(Path("/proc/stat")) or "").splitlines():
        name, *ticks = line.split()
        if name in names:
            user, nice, system, _idle, _waiting, interrupts, soft, *stolen = map(int, ticks)
            total += user + nice + system + interrupts + soft + sum(stolen[:1])
    return total / os.sysconf("SC_CLK_TCK")


def _get_quota() -> float | None:
    """CPU seconds per second that the control group (version 2, else 1) allows; None where it sets no limit."""
    limits = (_read(CGROUP / "cpu.max") or "").split()
    if not limits:
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        limits = [text for name in names if (text := _read(CGROUP / "cpu" / name)) is not None]
    if len(limits) < 2 or limits[0] in ("max", "-1"):
        return None
    return int(limits[0]) / int(limits[1])


def _read(path: Path) -> str | None:
    """The text of a small file; None where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def get_cpu_features() -> frozenset[str] | None:
    """The flags of /proc/cpuinfo ("flags" on x86, "Features" on Arm); None where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found.group(1).split()) if found else None


def get_machine() -> str:
    """The architecture of this machine under Linux's name for it: x86_64, aarch64."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def get_tvm_version() -> str | None:
    """The installed version of apache-tvm, without importing it; None when it is not installed."""
    try:
        return metadata.version("apache-tvm")
    except metadata.PackageNotFoundError:
        return None
