"""The files of a folder: their names, sizes and sha256, and errors that list what is wrong with them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..model.disk import cannot_be_written, sync
from .strict_json import shown, shown_lines

MANIFEST = "manifest.json"
PARITY = "parity.json"
MAX_PROBLEMS = 10


class BundleError(Exception):
    """A bundle that cannot be written or must not be loaded; the text says what, and what to do.

    Control characters, which the names of files may hold, are escaped: a terminal would obey them.
    """

    def __init__(self, text: str) -> None:
        super().__init__(shown_lines(text))


def scan(root: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The regular files under a folder by their relative names, and what is wrong with everything else."""
    files: dict[str, Path] = {}
    irregular: dict[str, str] = {}
    folders = [root]
    while folders:
        for entry in os.scandir(folders.pop()):
            path = Path(entry.path)
            name = path.relative_to(root).as_posix()
            if entry.is_symlink():
                irregular[name] = "a regular file expected, a symbolic link found; copy with `cp -rL`"
            elif entry.is_dir():
                folders.append(path)
            elif entry.is_file():
                files[name] = path
            else:
                irregular[name] = "a regular file expected, a device, pipe or socket found"
    return files, irregular


def size_of(path: Path) -> int | OSError:
    """The size of a file in bytes, or the error that keeps it from being read."""
    try:
        with path.open("rb", buffering=0) as file:
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        return error


def sha256s(paths: Iterable[Path]) -> list[str | OSError]:
    """The sha256 of each file in hexadecimal digits, or the error that kept it from being read; one thread a file."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(_sha256, paths))


def _sha256(path: Path) -> str | OSError:
    try:
        with path.open("rb", buffering=0) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, with the permissions that the umask leaves.

    OSError, which names the path, if that fails; an older file is then as it was.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    try:
        if path.exists() and not path.is_file():  # the rename would replace a device by a file
            raise OSError(0, "it is no regular file")
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        raise type(error)(cannot_be_written(path, error)) from error
    finally:
        with contextlib.suppress(OSError):  # where nothing can be written, there is nothing to remove
            temporary.unlink(missing_ok=True)


def bundle_error(headline: str, problems: dict[str, str], advice: str) -> BundleError:
    """An error that lists problems by file, ten at most."""
    lines = [f"  {shown(name)}: {problems[name]}" for name in sorted(problems, key=os.fsencode)[:MAX_PROBLEMS]]
    if len(problems) > MAX_PROBLEMS:
        lines.append(f"  ... and {len(problems) - MAX_PROBLEMS} more")
    return BundleError("\n".join([f"{headline}:", *lines, advice]))
