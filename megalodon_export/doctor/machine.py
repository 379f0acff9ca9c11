"""The machine's Python, cores, memory and disk, beside what an export needs. Standard library only."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path

from ..exporters.scratch import SET_TMPDIR, flaw_of, temporary_folder
from .report import Check

MIN_PYTHON = (3, 11)
MIN_MEMORY_GIB = 2.0
MIN_DISK_GIB = 1.0
_GIB = 2**30
_CGROUP = Path("/sys/fs/cgroup")


def machine_checks() -> list[Check]:
    """Checks of Python, the cores, the free memory, the temporary folder, and the free disk there if there is one."""
    wanted = ".".join(map(str, MIN_PYTHON))
    memory = available_memory() / _GIB
    checks = [
        Check(
            "Python",
            sys.version_info >= MIN_PYTHON,
            f"{platform.python_version()}, {platform.system()} {platform.machine()}",
            f"Python {wanted} or newer is needed",
        ),
        Check("CPU cores", True, str(usable_cores())),
        Check(
            "free memory",
            memory >= MIN_MEMORY_GIB,
            f"{memory:.1f} GiB",
            f"Compiling needs about {MIN_MEMORY_GIB:.0f} GiB beside the weights; end other programs or raise the limit",
        ),
    ]
    folder = temporary_folder()
    return [*checks, _temporary_check(folder), *([_disk_check(folder)] if folder is not None else [])]


def _temporary_check(folder: Path | None) -> Check:
    wanted, name = os.environ.get("TMPDIR"), "temporary folder"
    advice = SET_TMPDIR[0].upper() + SET_TMPDIR[1:]
    if folder is None:
        return Check(name, False, "none that can be written", advice)
    if flaw := flaw_of(folder):
        return Check(name, False, f"{folder} {flaw}", advice)
    if wanted and Path(wanted).absolute() != folder:
        return Check(name, None, f"{folder}, since TMPDIR, {wanted}, is not there or cannot be written", advice)
    return Check(name, True, str(folder))


def _disk_check(folder: Path) -> Check:
    disk = shutil.disk_usage(folder).free / _GIB
    return Check(
        "free disk",
        disk >= MIN_DISK_GIB,
        f"{disk:.1f} GiB in {folder}",
        f"Compiling needs about {MIN_DISK_GIB:.0f} GiB; free some, or set TMPDIR to a larger disk",
    )


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> float:
    """Bytes that a process can still allocate: what the machine has left, or less if a container limits it."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = float(fields["MemAvailable"].split()[0]) * 1024
    if (_CGROUP / "memory.max").exists() and (limit := (_CGROUP / "memory.max").read_text().strip()) != "max":
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        # The kernel frees inactive file pages when a process needs memory, so they do not count as used.
        used = float((_CGROUP / "memory.current").read_text()) - float(stat["inactive_file"])
        available = min(available, float(limit) - used)
    return available
