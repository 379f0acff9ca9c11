"""Writing bundles: into a staged folder that replaces an older bundle whole, sealed by its manifest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..model.conversion.staged_folder import StagingError, staged_folder
from .bundle import is_bundle
from .files import MANIFEST, PARITY, BundleError, bundle_error, scan, sha256s
from .manifest import SCHEMA_VERSION, FileEntry, Manifest
from .sealed_files import write_sealed


@contextlib.contextmanager
def staged(destination: Path | str, overwrite: bool = True) -> Iterator[Path]:
    """Yield an empty sibling folder to fill; it becomes `destination` if the block succeeds and vanishes if it fails.

    See `staged_folder` for crashes. Raises BundleError before anything is written if `destination` is something other
    than a bundle or an empty folder, if it exists and `overwrite` is False, or if another export to it is running.
    """

    def check(target: Path) -> None:
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

    try:
        with staged_folder(destination, check) as staging:
            yield staging
    except StagingError as error:
        raise BundleError(str(error)) from error


def seal(directory: Path | str, manifest: Manifest) -> Manifest:
    """List every file of `directory` with size and sha256 in `manifest`, write it as manifest.json, and return it.

    Nothing may be written to the folder afterwards but parity.json.
    Raises BundleError for symbolic links and for values that are not JSON (NaN included).
    """
    root = Path(directory)
    files, irregular = scan(root)
    if irregular:
        raise bundle_error(f"cannot seal {root}", irregular, "Put regular files there.")
    for name in (MANIFEST, PARITY):
        files.pop(name, None)
    listed = {}
    for name, digest in zip(sorted(files), sha256s(files[name] for name in sorted(files)), strict=True):
        if isinstance(digest, OSError):
            raise digest
        listed[name] = FileEntry(files[name].stat().st_size, digest)
    sealed = manifest.replace(schema_version=SCHEMA_VERSION, files=listed)
    return sealed.replace(seal=write_sealed(root / MANIFEST, sealed))


def update_parity(directory: Path | str, manifest: Manifest, parity: dict[str, Any]) -> dict[str, Any]:
    """Replace parity.json, the one file that changes after the export; returns it. A crash leaves the old one.

    `manifest` is that of the bundle that was measured. The report names its seal.
    """
    root = Path(directory)
    if not is_bundle(root):
        raise BundleError(f"{root} is not a bundle: it has no {MANIFEST}. Give the folder that the export wrote.")
    report = {**parity, "manifest": manifest.seal}
    return {**report, "seal": write_sealed(root / PARITY, report)}
