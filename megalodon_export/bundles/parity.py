"""parity.json: how far the programs of a bundle are from the eager model, as `verify` measured it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from ..exporters.manifest_types import Record
from .files import PARITY, BundleError
from .manifest import Manifest
from .sealed_files import read_sealed
from .sealing import UNSEALED, find_seal

_AGAIN = "Copy the bundle again, or delete the report and run `megalodon-export verify`."


class ParityRow(Record, frozen=True):
    """The largest differences of one runtime from the eager model in one case, and the bound that they must keep."""

    runtime: str
    case: str
    logits: float
    cache: float
    same_greedy_token: float
    bound: float


class Parity(Record, frozen=True, kw_only=True):
    """All of parity.json. `manifest` is the seal of the manifest of the bundle that was measured."""

    measured: str
    dtype: str
    against: str
    results: tuple[ParityRow, ...]
    manifest: str = UNSEALED
    seal: str = UNSEALED


def read_parity(folder: Path, manifest: Manifest) -> dict[str, Any] | None:
    """The report in a bundle, or None if there is none; BundleError if it is damaged, or of another bundle."""
    path = folder / PARITY
    if not path.exists() and not path.is_symlink():
        return None
    data, found = read_sealed(path, _AGAIN)
    if find_seal(data) is None:
        raise BundleError(f'{path}: "seal" expected at its end, none found. {_AGAIN}')
    try:
        parity = msgspec.convert(found, Parity)
    except msgspec.ValidationError as error:
        raise BundleError(f"{path}: {error}. {_AGAIN}") from error
    if parity.manifest != manifest.seal:
        raise BundleError(f"{path}: it was measured on another bundle, or before this one was changed. {_AGAIN}")
    return found
