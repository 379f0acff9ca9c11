"""Folders that are written whole or not at all: filled beside their destination, then renamed into its place.

with staged_folder("bundle") as staging:      # .bundle.staging-PID, a new empty folder
    (staging / "file").write_text("...")
# now: bundle/file, and nothing else; what stood at "bundle" before is gone
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

# The staging and retired folders that this process uses now. A stale folder may carry our own process id, since ids
# repeat from one container to the next.
_active: set[Path] = set()
_active_lock = threading.Lock()


class StagingError(Exception):
    """The folder cannot be written, or another process writes it; the text says what to do."""


@contextlib.contextmanager
def staged_folder(destination: Path | str, check: Callable[[Path], None] = lambda target: None) -> Iterator[Path]:
    """Yield an empty sibling folder to fill; it becomes `destination` if the block succeeds and vanishes if it fails.

    `check(target)` raises if what stands at the destination must not be replaced; it is called before anything is
    written, and again before the renames. At every instant the old folder is in place, or the new one, or, between two
    renames, neither; in that last case the old one lies beside it and the next `staged_folder` puts it back. What a
    killed process left is cleaned up.
    Raises StagingError for a mount point, a place that cannot be written, or one that another process writes.
    """
    target = Path(destination).expanduser().resolve()
    _check(target, check)
    staging, retired = _sibling(target, "staging"), _sibling(target, "old")
    with _active_lock:
        if staging in _active:
            raise _running(target, os.getpid(), staging)
        _active.update((staging, retired))
    try:
        _make_empty(staging)
        # Our own staging exists by now, so of two processes that start together at least one sees the other.
        _clean_up_after_dead(target)
        _check(target, check)
        yield staging
        _sync_tree(staging)
        _check(target, check)
        _swap(staging, target, retired)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _active.difference_update((staging, retired))


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    if os.name == "nt":  # neither folders nor files opened for reading can be synced there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check(target: Path, check: Callable[[Path], None]) -> None:
    if os.path.ismount(target):
        raise StagingError(f"{target} is a mount point and cannot be replaced whole; choose a folder inside it.")
    check(target)


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            if (path := Path(folder, name)).is_file():
                sync(path)
        sync(Path(folder))


def _make_empty(staging: Path) -> None:
    try:
        staging.parent.mkdir(parents=True, exist_ok=True)
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir()
    except OSError as error:
        raise StagingError(f"cannot write in {staging.parent}: {error.strerror}; choose another place.") from error


def _swap(staging: Path, target: Path, retired: Path) -> None:
    had_old = target.exists()
    if had_old:
        target.rename(retired)
    try:
        staging.rename(target)
    except BaseException:
        if had_old:
            retired.rename(target)
        raise
    sync(target.parent)
    shutil.rmtree(retired, ignore_errors=True)


def _sibling(target: Path, role: str) -> Path:
    return target.with_name(f".{target.name}.{role}-{os.getpid()}")


def _clean_up_after_dead(target: Path) -> None:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(staging|old)-([0-9]+)")
    for path in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if not match or path in _active:
            continue
        role, pid = match[1], int(match[2])
        if pid != os.getpid() and _is_alive(pid):
            if role == "staging":
                raise _running(target, pid, path)
        elif role == "old" and not target.exists():
            path.rename(target)  # killed between the two renames
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # signal 0 is Ctrl-C there
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _running(target: Path, pid: int, staging: Path) -> StagingError:
    return StagingError(
        f"another export to {target} is running (pid {pid}). "
        f"Wait for it; if that process is no export, remove {staging}."
    )
