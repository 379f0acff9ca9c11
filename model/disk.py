"""Files that are safe on the disk, and what is said of a disk that takes no more. The standard library alone."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
_GIB = 2**30


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    if os.name == "nt":  # neither folders nor files opened for reading can be synced there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_full(error: BaseException) -> bool:
    """Whether an error is due to a full disk or quota. Errors of other libraries may have a text alone."""
    return getattr(error, "errno", None) in _FULL or os.strerror(errno.ENOSPC) in str(error)


def cannot_be_written(path: Path, error: BaseException) -> str:
    """The sentence about a file or folder that an error kept from being written, without its full stop."""
    return f"{path} cannot be written: {getattr(error, 'strerror', None) or error}"


def disk_is_full(path: Path, error: BaseException) -> str:
    """The sentences about a folder that a full disk kept from being written: how much is free where, what to do."""
    why = os.strerror(getattr(error, "errno", None) or errno.ENOSPC)
    free = {str(place): shutil.disk_usage(place).free / _GIB for place in (path.parent, tempfile.gettempdir())}
    places = ", ".join(f"{gib:.2f} GiB are free in {place}" for place, gib in free.items())
    advice = "Free some, choose another place, or set TMPDIR to a folder on a larger disk."
    return f"{path} cannot be written: {why}; {places}. {advice}"
