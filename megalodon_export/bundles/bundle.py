"""The bundle on disk: written whole or not at all, and checked before anything in it is used.

A bundle is a folder with a `manifest.json` that lists every other file with its size and sha256. Two files are not
listed: `manifest.json` itself, written last, and `parity.json`, which `verify` rewrites long after the export.
The programs in a bundle are native code, so `read` comes before any of them is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import msgspec

from .manifest import SCHEMA_VERSION, FileEntry, Manifest

MANIFEST = "manifest.json"
PARITY = "parity.json"
MAX_PROBLEMS = 10

_RENEW = "Copy the bundle again, or export it again."
# Staging and retired folders of exports that run in this process: a stale one can carry our own pid, since process ids
# repeat from one container to the next.
_active: set[Path] = set()
_active_lock = threading.Lock()


class BundleError(Exception):
    """A bundle that cannot be written or must not be loaded; the text says what, and what to do."""


# ---------------------------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def staged(destination: Path | str, overwrite: bool = True) -> Iterator[Path]:
    """Yield an empty sibling folder to fill; it becomes `destination` if the block succeeds and vanishes if it fails.

    At every instant the old bundle is in place, or the new one, or, between two renames, neither; in that last case
    the old one lies beside it and the next `staged` puts it back. What a killed export left is cleaned up.
    Raises BundleError before anything is written if `destination` is something other than a bundle or an empty folder,
    if it exists and `overwrite` is False, or if another export to it is running.
    """
    target = Path(destination).expanduser().resolve()
    _check_replaceable(target, overwrite)
    staging, retired = _sibling(target, "staging"), _sibling(target, "old")
    with _active_lock:
        if staging in _active:
            raise _running(target, os.getpid(), staging)
        _active.update((staging, retired))
    try:
        _make_empty(staging)
        # Our own staging exists by now, so of two exports that start together at least one sees the other.
        _clean_up_after_dead(target)
        _check_replaceable(target, overwrite)
        yield staging
        _sync_tree(staging)
        _check_replaceable(target, overwrite)
        _swap(staging, target, retired)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _active.difference_update((staging, retired))


def seal(directory: Path | str, manifest: Manifest) -> Manifest:
    """List every file of `directory` with size and sha256 in `manifest`, write it as manifest.json, and return it.

    Nothing may be written to the folder afterwards but parity.json.
    Raises BundleError for symbolic links and for values that are not JSON (NaN included).
    """
    root = Path(directory)
    files, irregular = _scan(root)
    if irregular:
        raise _problems(f"cannot seal {root}", irregular, "Put regular files there.")
    for name in (MANIFEST, PARITY):
        files.pop(name, None)
    names = sorted(files)
    with _threads() as pool:
        digests = pool.map(_sha256, [files[name] for name in names])
        listed = {
            name: FileEntry(files[name].stat().st_size, digest) for name, digest in zip(names, digests, strict=True)
        }
    sealed = manifest.replace(schema_version=SCHEMA_VERSION, files=listed)
    _write_json(root / MANIFEST, sealed)
    return sealed


def update_parity(directory: Path | str, parity: dict[str, Any]) -> None:
    """Replace parity.json, the one file that changes after the export; a crash leaves the old one."""
    root = Path(directory)
    if not (root / MANIFEST).is_file():
        raise BundleError(f"{root} is not a bundle: it has no {MANIFEST}. Give the folder that the export wrote.")
    _write_json(root / PARITY, parity)


# ---------------------------------------------------------------------------------------------------------- reading


def read(directory: Path | str, check: Literal["full", "sizes"] = "full") -> Manifest:
    """Return the manifest after checking that the folder holds exactly the files it lists, unchanged.

    check: "full" hashes every file, "sizes" trusts contents of the right size. Call it before loading native code.
    Raises BundleError listing up to ten problems: missing, truncated, changed, unlisted or linked files, paths that
    leave the folder, another schema version, a manifest that cannot be read or contradicts itself.
    """
    if check not in ("full", "sizes"):
        raise ValueError(f'check is {check!r}; expected "full" or "sizes"')
    root = Path(directory)
    manifest = _load_manifest(root)
    try:
        found, problems = _scan(root)
    except OSError as error:
        raise BundleError(
            f"{root} cannot be read: {error.strerror} ({error.filename}). Check its permissions."
        ) from error
    linked = set(problems)
    suspects: dict[str, dict[str, Any]] = {}
    for name, entry in manifest["files"].items():
        if flaw := _entry_flaw(name, entry):
            problems[name] = flaw
        elif name in found:
            size = found[name].stat().st_size
            if size != entry["size"]:
                problems[name] = f"{entry['size']} bytes expected, {size} found"
            else:
                suspects[name] = entry
        elif not any(str(parent) in linked for parent in (PurePosixPath(name), *PurePosixPath(name).parents)):
            problems[name] = f"a file of {entry['size']} bytes expected, none found"
    for name in found.keys() - manifest["files"].keys():
        if not _is_unlisted(name):
            problems[name] = f"not listed in {MANIFEST}; remove it if it was added by hand"
    if check == "full":
        problems |= _changed(found, suspects)
    if problems:
        raise _problems(f"{root} is not the bundle that was exported", problems, _RENEW)
    try:
        return Manifest.from_json(manifest)
    except ValueError as error:
        raise BundleError(f"{root / MANIFEST}: {error}. Export it again.") from error


def is_bundle(directory: Path | str) -> bool:
    """Whether the folder claims to be a bundle (has a manifest.json); says nothing about its state."""
    return (Path(directory) / MANIFEST).is_file()


def _load_manifest(root: Path) -> dict[str, Any]:
    path = root / MANIFEST
    if not root.is_dir():
        raise BundleError(f"{root}: a bundle folder expected, {'a file' if root.exists() else 'nothing'} found.")
    if path.is_symlink() or not path.is_file():
        what = "is a symbolic link" if path.is_symlink() else "is missing"
        raise BundleError(f"{root} is not a complete bundle: {MANIFEST} {what}. {_RENEW}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise BundleError(f"{path}: a JSON object expected, found something unreadable ({error}). {_RENEW}") from error
    if not isinstance(manifest, dict):
        raise BundleError(f"{path}: a JSON object expected, {type(manifest).__name__} found. {_RENEW}")
    version = manifest.get("schema_version")
    if type(version) is not int:
        raise BundleError(f"{path}: schema_version {SCHEMA_VERSION} expected, {version!r} found. Export it again.")
    if version != SCHEMA_VERSION:
        advice = "Upgrade this package." if version > SCHEMA_VERSION else "Export it again."
        raise BundleError(f"{path}: schema_version {SCHEMA_VERSION} expected, {version} found. {advice}")
    if not isinstance(manifest.get("files"), dict):
        raise BundleError(f'{path}: "files", an object of file names, expected; none found. {_RENEW}')
    return manifest


def _entry_flaw(name: str, entry: Any) -> str | None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or str(path) != name or name == ".":
        return f"listed in {MANIFEST}, but not a plain path inside the bundle"
    if not isinstance(entry, dict) or type(entry.get("size")) is not int:
        return f"no whole number as its size in {MANIFEST}"
    if not isinstance(entry.get("sha256"), str) or not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
        return f"no sha256 of 64 lower-case hexadecimal digits in {MANIFEST}"
    return None


def _changed(found: dict[str, Path], suspects: dict[str, dict[str, Any]]) -> dict[str, str]:
    def flaw(name: str) -> str | None:
        expected = suspects[name]["sha256"]
        try:
            digest = _sha256(found[name])
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        return None if digest == expected else f"sha256 {expected} expected, {digest} found"

    # Largest first: hashing is one thread per file, and the weights decide when it ends.
    names = sorted(suspects, key=lambda name: -suspects[name]["size"])
    with _threads() as pool:
        return {name: problem for name, problem in zip(names, pool.map(flaw, names), strict=True) if problem}


def _problems(headline: str, problems: dict[str, str], advice: str) -> BundleError:
    lines = [f"  {name}: {problems[name]}" for name in sorted(problems)[:MAX_PROBLEMS]]
    if len(problems) > MAX_PROBLEMS:
        lines.append(f"  ... and {len(problems) - MAX_PROBLEMS} more")
    return BundleError("\n".join([f"{headline}:", *lines, advice]))


# -------------------------------------------------------------------------------------------------- files and folders


def _scan(root: Path) -> tuple[dict[str, Path], dict[str, str]]:
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


def _is_unlisted(name: str) -> bool:
    # The second form is what a crash inside update_parity leaves; it must not make a good bundle unreadable.
    return name in (MANIFEST, PARITY) or name.startswith(f".{PARITY}.")


def _sha256(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))


def _write_json(path: Path, value: Any) -> None:
    try:
        data = (json.dumps(msgspec.to_builtins(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise BundleError(f"{path.name}: only JSON values can be written, and finite numbers ({error}).") from error
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def _sync(path: Path) -> None:
    if os.name == "nt":  # neither folders nor files opened for reading can be synced there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            if (path := Path(folder, name)).is_file():
                _sync(path)
        _sync(Path(folder))


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if os.path.ismount(target):
        raise BundleError(f"{target} is a mount point and cannot be replaced whole; choose a folder inside it.")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not is_bundle(target):
        what = f"a folder without {MANIFEST}" if target.is_dir() else "a file"
        raise BundleError(
            f"{target} is {what}; a bundle, an empty folder or nothing expected there. "
            "It is left as it is: choose another output, or move it away."
        )
    if not overwrite:
        raise BundleError(f"{target} exists already; remove it, choose another output, or allow overwriting.")


def _make_empty(staging: Path) -> None:
    try:
        staging.parent.mkdir(parents=True, exist_ok=True)
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir()
    except OSError as error:
        raise BundleError(f"cannot write in {staging.parent}: {error.strerror}; choose another place.") from error


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
    _sync(target.parent)
    shutil.rmtree(retired, ignore_errors=True)


def _sibling(target: Path, role: str, pid: int | None = None) -> Path:
    return target.with_name(f".{target.name}.{role}-{os.getpid() if pid is None else pid}")


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


def _running(target: Path, pid: int, staging: Path) -> BundleError:
    return BundleError(
        f"another export to {target} is running (pid {pid}). "
        f"Wait for it; if that process is no export, remove {staging}."
    )
