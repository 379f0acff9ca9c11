"""Seals of JSON files. A sealed file ends with the key "seal": the sha256 of the file, with zeros in its place.

manifest.json and parity.json are sealed. The manifest holds the hashes of all other files, so its seal covers the
bundle.

    {
      "created": "2026-11-27T20:00:00+00:00",
      ...
      "seal": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    }
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

UNSEALED = "0" * 64
_END = re.compile(rb'"seal": "([0-9a-f]{64})"\n}\n\Z')


def sealed_json(value: dict[str, Any]) -> tuple[bytes, str]:
    """The text of a sealed file, and the seal. TypeError or ValueError for what is not JSON, NaN included."""
    unsealed = {**{key: one for key, one in value.items() if key != "seal"}, "seal": UNSEALED}
    data = (json.dumps(unsealed, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    seal = hashlib.sha256(data).hexdigest()
    return data[: -len(UNSEALED) - 4] + f'{seal}"\n}}\n'.encode(), seal


def find_seal(data: bytes) -> str | None:
    """The seal at the end of a file; None if there is none."""
    found = _END.search(data)
    return found[1].decode() if found else None


def seal_matches(data: bytes, seal: str) -> bool:
    """Whether the seal at the end of a file is that of its content."""
    return hashlib.sha256(data[: -len(UNSEALED) - 4] + f'{UNSEALED}"\n}}\n'.encode()).hexdigest() == seal
