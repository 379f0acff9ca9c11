"""Folders that are written whole or not at all: filled beside their destination, then renamed into its place.

with staged_folder("bundle") as staging:      # .bundle.staging-7d2f90c1, a new empty folder
    (staging / "file").write_text("...")
# now: bundle/file, and nothing else; what stood at "bundle" before is gone

One process at a time writes a destination. It holds a lock (flock) on the file .bundle.lock beside it. The kernel drops
the lock of a process that is killed, so what lies there while the lock is free is stale, and is removed. No process id
is compared: two containers that share a disk may both have process 1.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from ..disk import cannot_be_written, disk_is_full, is_full, sync

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Errors of a system call that the system or the file system does not have.
_NOT_THERE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
# From the Linux headers, for renameat2.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class StagingError(Exception):
    """The folder cannot be written, or another process writes it; the text says what to do."""


@contextlib.contextmanager
def staged_folder(destination: Path | str, check: Callable[[Path], None] = lambda target: None) -> Iterator[Path]:
    """Yield an empty sibling folder to fill; it becomes `destination` if the block succeeds and vanishes if it fails.

    `check(target)` raises if what stands at the destination must not be replaced; it is called before anything is
    written, and again before the renames. Where the file system can exchange two folders, the old folder or the new one
    is in place at every instant. Elsewhere there are two renames; if the process is killed between them, the next
    `staged_folder` puts the old folder back. What a killed process left is removed. A file system without locks (some
    network disks) has no protection against a second writer, so nothing is removed there.
    Raises StagingError for a mount point, a full disk, a place that cannot be written or that another process writes.
    """
    target = _resolve(destination)
    with _reporting(target):
        _check(target, check)
    with _lock(target) as locked:
        if locked:
            _clean_up(target)
        _check(target, check)
        staging = _sibling(target, "staging")
        try:
            with _reporting(target):
                staging.mkdir()
            with _full_disks_named(target):
                yield staging
                _sync_tree(staging)
            _check(target, check)
            with _reporting(target):
                _swap(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _resolve(destination: Path | str) -> Path:
    try:
        target = Path(destination).expanduser().resolve()
        os.fsencode(target).decode()
    except RuntimeError as error:  # ~NAME of nobody, or a circle of links
        raise StagingError(f"{destination} cannot be written: {error}; give the path in full.") from error
    except (UnicodeError, ValueError) as error:
        name = repr(str(destination))
        raise StagingError(f"{name} cannot be written: its name is not UTF-8; choose another one.") from error
    return target


def _check(target: Path, check: Callable[[Path], None]) -> None:
    if os.path.ismount(target):
        raise StagingError(f"{target} is a mount point and cannot be replaced whole; choose a folder inside it.")
    check(target)


@contextlib.contextmanager
def _reporting(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise StagingError(disk_is_full(target, error)) from error
        where = f" ({error.filename2 or error.filename})" if error.filename else ""
        raise StagingError(f"{cannot_be_written(target, error)}{where}; choose another place.") from error


@contextlib.contextmanager
def _full_disks_named(target: Path) -> Iterator[None]:
    """Turn an error that is due to a full disk into a sentence; the other libraries' texts name no place."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        raise StagingError(disk_is_full(target, error)) from error


# ---- the lock --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _lock(target: Path) -> Iterator[bool]:
    """Hold the lock on a destination; False if the file system has no locks. StagingError if somebody else holds it."""
    path = target.with_name(f".{target.name}.lock")
    missing = [folder for folder in target.parents if not folder.exists()]
    with _reporting(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, locked = _open_locked(path, target)
    try:
        with contextlib.suppress(OSError):  # the text is for the error of others; a full disk shows later
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield locked
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # before the lock is dropped, so that nobody locks a file that is about to go
        os.close(descriptor)
        with contextlib.suppress(OSError):  # after a failure; a folder with something in it stays
            for folder in missing:
                folder.rmdir()


def _open_locked(path: Path, target: Path) -> tuple[int, bool]:
    """A descriptor of the lock file, and whether it is locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if fcntl is None or _is_at(descriptor, path):
                return descriptor, fcntl is not None
        except BlockingIOError:
            owner = os.read(descriptor, 200).decode(errors="replace") or "a process that has just begun"
            os.close(descriptor)
            raise StagingError(
                f"{target} is being written by another export or conversion ({owner}). "
                "Wait for its end, or choose another place."
            ) from None
        except OSError as error:
            if error.errno in _NOT_THERE:
                return descriptor, False
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner removed the file between our two calls


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


# ---- folders ---------------------------------------------------------------------------------------------------------


def _sibling(target: Path, role: str) -> Path:
    return target.with_name(f".{target.name}.{role}-{secrets.token_hex(4)}")


def _clean_up(target: Path) -> None:
    """Remove what killed processes left, and put an old folder back that one of them had moved away. Needs the lock."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(staging|old)-[0-9a-f]+", re.DOTALL)
    for path in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if match and match[1] == "old" and not target.exists():
            path.rename(target)
        elif match:
            # A compiler that outlives its export by an instant looks for the folder under its old name.
            shutil.rmtree(path.rename(_sibling(target, "staging")), ignore_errors=True)


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            if (path := Path(folder, name)).is_file():
                sync(path)
        sync(Path(folder))


def _swap(staging: Path, target: Path) -> None:
    """Put the new folder in place; the old one is in `staging` afterwards, or gone."""
    if not target.exists():
        staging.rename(target)
    elif not _exchange(staging, target):
        retired = _sibling(target, "old")
        target.rename(retired)
        try:
            staging.rename(target)
        except BaseException:
            retired.rename(target)
            raise
        retired.rename(staging)
    sync(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    error = ctypes.get_errno()
    if error in _NOT_THERE:
        return False
    raise OSError(error, os.strerror(error), str(other))
