"""API keys: who sends a request."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from .errors import ApiError


class Keys:
    """The keys that are accepted. Without any, everybody is accepted, as one owner."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [_digest(key) for key in keys]

    @classmethod
    def of_file(cls, path: Path) -> Keys:
        """Keys of a file, one a line; ValueError for a file without any."""
        keys = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        keys = [key for key in keys if key and not key.startswith("#")]
        if not keys:
            raise ValueError(f"{path} has no keys; write one a line")
        return cls(keys)

    def owner(self, authorization: str | None) -> str:
        """Whose request it is, a name made from the key; ApiError for a request without a right key.

        Every key is compared, in constant time, so that the time tells nothing of them.
        """
        if not self._digests:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        digest = _digest(key.strip())
        right = [hmac.compare_digest(digest, one) for one in self._digests]
        if scheme.lower() != "bearer" or not any(right):
            raise ApiError(401, "send a right API key: Authorization: Bearer KEY", code="invalid_api_key")
        return hashlib.sha256(b"owner " + digest).hexdigest()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
