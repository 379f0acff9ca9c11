"""Reads and writes the sealed files of a bundle: manifest.json and parity.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from .files import BundleError, write_whole
from .sealing import find_seal, seal_matches, sealed_json
from .strict_json import has_control_characters, parse_json, strings


def read_sealed(path: Path, advice: str) -> tuple[bytes, dict[str, Any]]:
    """The bytes of a file and the JSON object in them; BundleError if it is damaged. `advice` ends the message.

    A file without a seal passes: a manifest of another version has none. The caller demands the seal.
    """
    try:
        data = path.read_bytes()
        seal = find_seal(data)
        if seal is not None and not seal_matches(data, seal):
            raise BundleError(f"{path}: its seal does not match its content, so it was damaged or edited. {advice}")
        found = parse_json(data)
        if any(map(has_control_characters, strings(found))):
            raise ValueError("a control character in a string")
    except (ValueError, OSError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise BundleError(f"{path}: a JSON object expected, found something unreadable ({why}). {advice}") from error
    if not isinstance(found, dict):
        raise BundleError(f"{path}: a JSON object expected, {type(found).__name__} found. {advice}")
    return data, found


def write_sealed(path: Path, value: Any) -> str:
    """Write a JSON file with a seal beside its place, then rename it there; returns the seal."""
    try:
        data, seal = sealed_json(msgspec.to_builtins(value))
    except (TypeError, ValueError) as error:
        raise BundleError(f"{path.name}: only JSON values can be written, and finite numbers ({error}).") from error
    write_whole(path, data)
    return seal
