"""Stored responses: handles on states, in memory or in a folder that outlives the process.

A stored response is two files. The second one is written when the first is safely on the disk, and makes it real:

    resp_ID.safetensors    the state, as a snapshot that Python and C++ read
    resp_ID.json           the record: whose it is, when it expires, and the response itself

So a process that is killed at any time leaves whole responses, or files that the next start removes.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from ..bundles.files import write_whole
from ..generation.snapshot import Snapshot

ID = re.compile("resp_[0-9a-f]{48}")


class StoredResponse(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a stored response. `size` is that of its state in bytes, `position` the tokens fed to it.

    Times are seconds since 1970. `body` is the response as it was answered.
    """

    id: str
    owner: str
    created_at: float
    expires_at: float
    position: int
    size: int
    body: dict[str, Any]

    def summary(self) -> dict[str, Any]:
        """What a list says of it."""
        return {
            **{"id": self.id, "object": "response.state", "created_at": int(self.created_at)},
            **{"expires_at": int(self.expires_at), "tokens": self.position, "bytes": self.size},
        }


class ResponseStore:
    """Stored responses by id, the oldest first. Any thread may use it.

    folder: holds the responses; None for memory alone. seconds: until one expires. count, size: of all together; the
    oldest of the owner who has stored the most make room.
    """

    def __init__(
        self, folder: Path | None = None, seconds: float = 30 * 86400.0, count: int = 10_000, size: int = 8 << 30
    ) -> None:
        self._folder, self._seconds, self._count, self._size = folder, seconds, count, size
        self._records: dict[str, StoredResponse] = {}
        self._in_memory: dict[str, bytes] = {}
        self._lock = threading.RLock()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._recover(folder)

    @property
    def used(self) -> int:
        """Bytes of all states."""
        return sum(record.size for record in list(self._records.values()))

    def __len__(self) -> int:
        return len(self._records)

    def save(self, name: str, owner: str, body: dict[str, Any], state: Snapshot) -> StoredResponse:
        """Store a response. When this returns, a response in a folder survives any end of the process.

        OSError, with nothing stored, if it cannot be written.
        """
        content, now = state.to_bytes(), time.time()
        record = StoredResponse(
            id=name,
            owner=owner,
            created_at=now,
            expires_at=now + self._seconds,
            position=int(state.tensors["final.position"][0]),
            size=len(content),
            body=body,
        )
        if len(content) > self._size:
            raise OSError(0, f"a state of {len(content)} bytes, more than there is room for")
        with self._lock:
            self._make_room(len(content))
        try:
            if self._folder is not None:
                write_whole(self._state_file(name), content)
                write_whole(self._record_file(name), msgspec.json.encode(record))
        except OSError:
            self._unlink(name)
            raise
        with self._lock:
            if self._folder is None:
                self._in_memory[name] = content
            self._records[name] = record
        return record

    def get(self, name: str, owner: str) -> StoredResponse | None:
        """A response of this owner; None for any other."""
        with self._lock:
            self._expire()
            record = self._records.get(name)
            return record if record is not None and record.owner == owner else None

    def content(self, record: StoredResponse) -> bytes | None:
        """The bytes of the snapshot file; None if it is lost, and then the response is forgotten."""
        if self._folder is None:
            return self._in_memory.get(record.id)
        try:
            return self._state_file(record.id).read_bytes()
        except OSError:
            self._forget(record.id)
            return None

    def list(self, owner: str) -> list[StoredResponse]:
        """The responses of an owner, the newest first."""
        with self._lock:
            self._expire()
            return [record for record in reversed(self._records.values()) if record.owner == owner]

    def delete(self, name: str, owner: str) -> bool:
        """Delete a response of this owner; whether there was one."""
        with self._lock:
            if self.get(name, owner) is None:
                return False
            self._forget(name)
            return True

    def _expire(self) -> None:
        now = time.time()
        for name in [name for name, record in self._records.items() if record.expires_at <= now]:
            self._forget(name)

    def _make_room(self, size: int) -> None:
        self._expire()
        while self._records and (len(self._records) >= self._count or self.used + size > self._size):
            self._forget(self._least_wanted())

    def _least_wanted(self) -> str:
        """The oldest response of the owner who has stored the most bytes, so that nobody crowds out another."""
        sizes: Counter[str] = Counter()
        for record in self._records.values():
            sizes[record.owner] += record.size
        ((owner, _),) = sizes.most_common(1)
        return next(name for name, record in self._records.items() if record.owner == owner)

    def _forget(self, name: str) -> None:
        with self._lock:
            self._records.pop(name, None)
            self._in_memory.pop(name, None)
            self._unlink(name)

    def _unlink(self, name: str) -> None:
        """Remove the files; first the record, so that no record is left without its state."""
        if self._folder is not None:
            for path in (self._record_file(name), self._state_file(name)):
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)

    def _recover(self, folder: Path) -> None:
        """Read the records, and remove what is not whole."""
        found = []
        for path in folder.glob("resp_*.json"):
            record = _read(path)
            if record is not None and self._state_file(record.id).is_file():
                found.append(record)
        self._records = {record.id: record for record in sorted(found, key=lambda one: one.created_at)}
        for path in folder.iterdir():
            if re.match(r"\.?resp_", path.name) and path.name.split(".")[0] not in self._records:
                with contextlib.suppress(OSError):
                    path.unlink()
        self._expire()

    def _state_file(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}.safetensors"

    def _record_file(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}.json"


def _read(path: Path) -> StoredResponse | None:
    try:
        record = msgspec.json.decode(path.read_bytes(), type=StoredResponse)
    except (OSError, msgspec.MsgspecError):
        return None
    return record if record.id == path.name.removesuffix(".json") and ID.fullmatch(record.id) else None
