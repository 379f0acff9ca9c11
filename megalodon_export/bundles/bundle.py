"""The bundle on disk, checked before anything in it is used.

A bundle is a folder with a `manifest.json` that lists every other file with its size and sha256. Two files are not
listed: `manifest.json` itself, written last, and `parity.json`, which `verify` rewrites long after the export.
The programs in a bundle are native code, so `read` comes before any of them is loaded.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from .contents import check_manifest
from .files import MANIFEST, PARITY, BundleError, bundle_error, scan, sha256s, size_of
from .manifest import SCHEMA_VERSION, Manifest
from .sealed_files import read_sealed
from .sealing import find_seal

__all__ = ["MANIFEST", "PARITY", "SCHEMA_VERSION", "BundleError", "is_bundle", "read"]

_RENEW = "Copy the bundle again, or export it again."


def read(directory: Path | str, check: Literal["full", "sizes"] = "full") -> Manifest:
    """Return the manifest after checking that the folder holds exactly the files it lists, unchanged.

    check: "full" hashes every file, "sizes" trusts contents of the right size. Call it before loading native code.
    Raises BundleError listing up to ten problems: missing, truncated, changed, unlisted or linked files, files that may
    not be read, paths that leave the folder, another schema version, a manifest that cannot be read or contradicts
    itself.
    """
    if check not in ("full", "sizes"):
        raise ValueError(f'check is {check!r}; expected "full" or "sizes"')
    root = Path(directory)
    try:
        found = _load_json(root)
        problems = _file_problems(root, found["files"], check == "full")
    except OSError as error:
        why = f"{error.strerror} ({error.filename})"
        raise BundleError(f"{root} cannot be read: {why}. Check its permissions.") from error
    if problems:
        raise bundle_error(f"{root} is not the bundle that was exported", problems, _RENEW)
    try:
        return check_manifest(root, found)
    except ValueError as error:
        raise BundleError(f"{root / MANIFEST}: {error}. Export it again.") from error


def is_bundle(directory: Path | str) -> bool:
    """Whether the folder claims to be a bundle (has a manifest.json); says nothing about its state."""
    return (Path(directory) / MANIFEST).is_file()


# The checks from here to the end come before the manifest's types are checked, so they read plain JSON. The C++ library
# makes the same checks in the same order and the same words (cpp/src/bundle/folder.cpp).


def _load_json(root: Path) -> dict[str, Any]:
    path = root / MANIFEST
    if not root.is_dir():
        raise BundleError(f"{root}: a bundle folder expected, {'a file' if root.exists() else 'nothing'} found.")
    if path.is_symlink() or not path.is_file():
        what = "is a symbolic link" if path.is_symlink() else "is missing"
        raise BundleError(f"{root} is not a complete bundle: {MANIFEST} {what}. {_RENEW}")
    data, manifest = read_sealed(path, _RENEW)
    version = manifest.get("schema_version")
    if type(version) is not int:
        raise BundleError(f"{path}: schema_version {SCHEMA_VERSION} expected, {version!r} found. Export it again.")
    if version != SCHEMA_VERSION:
        advice = "Upgrade this package." if version > SCHEMA_VERSION else "Export it again."
        raise BundleError(f"{path}: schema_version {SCHEMA_VERSION} expected, {version} found. {advice}")
    if find_seal(data) is None:
        raise BundleError(f'{path}: "seal" expected at its end, none found. {_RENEW}')
    if not isinstance(manifest.get("files"), dict):
        raise BundleError(f'{path}: "files", an object of file names, expected; none found. {_RENEW}')
    return manifest


def _file_problems(root: Path, listed: dict[str, Any], hash_contents: bool) -> dict[str, str]:
    """Faults of a folder's files, by their names, beside a manifest's list of files."""
    found, problems = scan(root)
    linked = set(problems)
    sound: dict[str, dict[str, Any]] = {}  # entries of files that can be read and whose sizes are right
    for name, entry in listed.items():
        if flaw := _entry_flaw(name, entry):
            problems[name] = flaw
        elif name in found:
            size = size_of(found[name])
            if isinstance(size, OSError):
                problems[name] = f"cannot be read: {size.strerror}"
            elif size != entry["size"]:
                problems[name] = f"{entry['size']} bytes expected, {size} found"
            else:
                sound[name] = entry
        elif not any(str(parent) in linked for parent in (PurePosixPath(name), *PurePosixPath(name).parents)):
            problems[name] = f"a file of {entry['size']} bytes expected, none found"
    for name in found.keys() - listed.keys():
        if not _is_unlisted(name):
            problems[name] = f"not listed in {MANIFEST}; remove it if it was added by hand"
    return problems | (_changed(found, sound) if hash_contents else {})


def _entry_flaw(name: str, entry: Any) -> str | None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or str(path) != name or name == ".":
        return f"listed in {MANIFEST}, but not a plain path inside the bundle"
    if not isinstance(entry, dict) or type(entry.get("size")) is not int:
        return f"no whole number as its size in {MANIFEST}"
    if not isinstance(entry.get("sha256"), str) or not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
        return f"no sha256 of 64 lower-case hexadecimal digits in {MANIFEST}"
    if name in (MANIFEST, PARITY):
        return f"listed in {MANIFEST}, which lists neither itself nor {PARITY}"
    return None if len(entry) == 2 else f"more than a size and a sha256 in {MANIFEST}"


def _is_unlisted(name: str) -> bool:
    # A crash inside `update_parity` leaves a file of the second form; it must not make a good bundle unreadable.
    return name in (MANIFEST, PARITY) or name.startswith(f".{PARITY}.")


def _changed(found: dict[str, Path], entries: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The files whose sha256 is another one than that listed."""
    # Largest first: hashing is one thread per file, and the weights decide when it ends.
    names = sorted(entries, key=lambda name: -entries[name]["size"])
    problems = {}
    for name, digest in zip(names, sha256s(found[name] for name in names), strict=True):
        if isinstance(digest, OSError):
            problems[name] = f"cannot be read: {digest.strerror}"
        elif digest != entries[name]["sha256"]:
            problems[name] = f"sha256 {entries[name]['sha256']} expected, {digest} found"
    return problems
