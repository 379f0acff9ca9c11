"""Where kept states lie: on the device, then in host memory, then on disk; the least recently used one moves down.

    put      -> device -> host -> disk -> forgotten
    load     <- from any of them; the state is on the device again

On a CPU the device is the host, and the two budgets are one.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch

from ..generation.snapshot import Snapshot
from ..model import ModelConfig
from .states import StreamState


class Kept:
    """A state that a store keeps. `state` is None while it is on disk."""

    __slots__ = ("drop", "file", "level", "position", "size", "state")

    def __init__(self, state: StreamState, drop: Callable[[], None]) -> None:
        """`drop` is called when the store forgets the state."""
        self.state: StreamState | None = state
        self.position, self.size, self.drop = state.position, state.size, drop
        self.level = 0
        self.file: Path | None = None

    @property
    def is_dropped(self) -> bool:
        """Whether the store has forgotten it."""
        return self.state is None and self.file is None


class StateStore:
    """Kept states under byte budgets. One thread puts and loads; any thread reads the sizes."""

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        device_bytes: int,
        host_bytes: int,
        folder: Path | None = None,
        disk_bytes: int = 0,
    ) -> None:
        """`folder` holds this store's files alone; those of an earlier process are removed."""
        self._config, self._device = config, device
        on_host = device.type == "cpu"
        self.budgets = [device_bytes + host_bytes if on_host else device_bytes, 0 if on_host else host_bytes]
        self.budgets.append(disk_bytes if folder is not None else 0)
        self._levels: list[OrderedDict[int, Kept]] = [OrderedDict() for _ in self.budgets]
        self.used = [0 for _ in self.budgets]
        self._folder = folder
        self._lock = threading.Lock()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob("*.safetensors"):
                left.unlink(missing_ok=True)

    @property
    def count(self) -> int:
        """States kept, wherever they are."""
        return sum(map(len, self._levels))

    def put(self, state: StreamState, drop: Callable[[], None]) -> Kept | None:
        """Keep a state; None if it is larger than all memory there is for states."""
        if state.size > max(self.budgets[:2]):
            return None
        kept = Kept(state, drop)
        with self._lock:
            self._place(kept, 0)
        return kept

    def load(self, kept: Kept) -> StreamState | None:
        """The state, which is now the most recently used one; None if its file is lost. It is then forgotten."""
        with self._lock:
            state = kept.state if kept.file is None else self._read(kept.file)
            self._unplace(kept)
            if state is None:
                self._drop(kept)
                return None
            state = state.to(self._device)
            kept.state, kept.size = state, state.size
            self._place(kept, 0)
            return state

    def forget(self, kept: Kept) -> None:
        """Drop a state."""
        with self._lock:
            self._unplace(kept)
            self._drop(kept)

    def _place(self, kept: Kept, level: int) -> None:
        self._levels[level][id(kept)] = kept
        self.used[level] += kept.size
        kept.level = level
        while self.used[level] > self.budgets[level]:
            _, oldest = self._levels[level].popitem(last=False)
            self.used[level] -= oldest.size
            self._lower(oldest, level + 1)

    def _unplace(self, kept: Kept) -> None:
        """Take a state off its level, and its file off the disk."""
        if self._levels[kept.level].pop(id(kept), None) is not None:
            self.used[kept.level] -= kept.size
        self._remove_file(kept)

    @staticmethod
    def _remove_file(kept: Kept) -> None:
        if kept.file is not None:
            with contextlib.suppress(OSError):
                kept.file.unlink()
            kept.file = None

    def _drop(self, kept: Kept) -> None:
        """Forget a state that is on no level."""
        self._remove_file(kept)
        kept.state = None
        kept.drop()

    def _lower(self, kept: Kept, level: int) -> None:
        """Move a state, which is on no level now, to the first level from `level` on that has room for it."""
        while level < len(self.budgets) and kept.size > self.budgets[level]:
            level += 1
        if level == len(self.budgets):
            self._drop(kept)
        elif level == 1:
            assert kept.state is not None
            kept.state = kept.state.to("cpu")
            self._place(kept, level)
        elif self._write(kept):
            self._place(kept, level)
        else:
            self._drop(kept)

    def _write(self, kept: Kept) -> bool:
        """Move a state to a file; whether that worked. A disk that takes no more costs hits, and nothing else."""
        assert self._folder is not None
        assert kept.state is not None
        file = self._folder / f"{secrets.token_hex(16)}.safetensors"
        try:
            file.write_bytes(kept.state.snapshot(self._config, None, "").to_bytes())
        except OSError:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
            return False
        kept.file, kept.state = file, None
        return True

    def _read(self, file: Path) -> StreamState | None:
        try:
            return StreamState.of_snapshot(self._config, Snapshot.load(file))
        except (OSError, ValueError, KeyError):
            return None
