"""Folders for compilers: AOTInductor's command lines take no spaces, quotes or newlines in a path.

with scratch_folder(Path("/data/my model")) as scratch:
    scratch.folder         # /tmp/megalodon-export-x1k2: compile here, copy the results
    scratch.environment    # {}, or TMPDIR and TORCHINDUCTOR_CACHE_DIR for the compilers, where theirs cannot be used
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .workers import CompileError

SET_TMPDIR = (
    "set TMPDIR to a folder that can be written, on a file system that programs may run from, "
    "with a path of letters, digits and ._/+=@,- alone"
)
_PLAIN = re.compile(r"[A-Za-z0-9_./+=@,-]+")
_CACHE = "TORCHINDUCTOR_CACHE_DIR"


@dataclass(frozen=True)
class Scratch:
    """An empty folder with a plain path, and the environment variables for the compilers that work in it."""

    folder: Path
    environment: dict[str, str]


@contextlib.contextmanager
def scratch_folder(destination: Path) -> Iterator[Scratch]:
    """Yield a folder for compilers, and remove it in the end. It is in `destination` if the path of that is plain.

    Otherwise it is in the temporary folder. CompileError, before anything is compiled, if no folder can be used, or if
    the destination is on a file system that no program may run from: the export runs its programs there.
    """
    if is_noexec(destination):
        raise CompileError(
            f"{destination.parent} is on a file system mounted noexec, and the programs could not be run from there; "
            "choose another place for the bundle."
        )
    temporary = temporary_folder()
    places = destination, temporary, Path("/tmp"), Path("/var/tmp")
    place = next((path for path in places if path is not None and flaw_of(path) is None), None)
    if place is None:
        raise CompileError(f"no temporary folder for the compilers: {SET_TMPDIR}")
    with tempfile.TemporaryDirectory(prefix=".megalodon-export-", dir=place, ignore_cleanup_errors=True) as name:
        environment = {}
        if temporary is None or flaw_of(temporary) is not None:
            environment = {"TMPDIR": name, _CACHE: f"{name}/cache"}
        elif not _PLAIN.fullmatch(os.environ.get(_CACHE, "/")):
            environment = {_CACHE: f"{name}/cache"}
        yield Scratch(Path(name), environment)


def is_noexec(folder: Path) -> bool:
    """Whether no program may run from a folder's file system."""
    return hasattr(os, "ST_NOEXEC") and bool(os.statvfs(folder).f_flag & os.ST_NOEXEC)


def temporary_folder() -> Path | None:
    """The temporary folder that Python has found; it passes over those that cannot be written."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        return None


def flaw_of(folder: Path) -> str | None:
    """Why compilers cannot work in a folder, as the end of a sentence."""
    if not os.access(folder, os.W_OK | os.X_OK):
        return "cannot be written"
    if is_noexec(folder):
        return "is on a file system mounted noexec"
    return None if _PLAIN.fullmatch(str(folder)) else "has a path that compilers do not take"
