"""The rows of the decode batch. Running streams fill the first rows, so a step runs the smallest batch that holds them.

Three streams run in a cache of four rows, and the one in row 0 leaves:

    row      0  1  2  3             0  1  2  3
    stream   a  b  c  -     ->      c  b  -  -     the last stream moves; the next step runs two rows
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..generation.decode_loop import padded_batch
from ..model import ModelCache
from ..runtimes import BoundPrograms, Runtime
from .states import StateCopier, StreamState, reset_row


class Rows:
    """One cache of `capacity` rows, and programs for each batch size over its first rows."""

    def __init__(self, runtime: Runtime, capacity: int) -> None:
        self.runtime, self.capacity = runtime, capacity
        self._cache = runtime.new_cache(padded_batch(runtime, capacity))
        self._copier = StateCopier(runtime.config)
        self._programs: dict[int, BoundPrograms] = {}
        self.positions: list[int] = []  # tokens fed to each running stream

    def __len__(self) -> int:
        return len(self.positions)

    def append(self, state: StreamState) -> None:
        """Let a stream join behind the others."""
        self._copier.put(state, self._cache, len(self))
        self.positions.append(state.position)

    def remove(self, row: int) -> None:
        """Let a stream leave; the last one takes its row."""
        last = len(self) - 1
        if row != last:
            self._copier.move(self._cache, last, row, self.positions[last])
            self.positions[row] = self.positions[last]
        del self.positions[last]

    def take(self, row: int, logits: Tensor | None) -> StreamState:
        """A copy of a stream's state."""
        return self._copier.take(self._cache, row, self.positions[row], logits)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Feed one token to each running stream; float32 logits (n, V), which the next step may overwrite."""
        programs = self._bound(padded_batch(self.runtime, len(self)))
        fed = torch.zeros(programs.cache.batch, dtype=torch.int64, device="cpu")
        fed[: len(tokens)] = torch.tensor(tokens, dtype=torch.int64, device="cpu")
        logits = programs.step(fed)[: len(self)]
        self.positions = [position + 1 for position in self.positions]
        return logits

    def clean(self, row: int) -> None:
        """Wipe a row whose stream failed, so that no NaN is left for the stream that uses it next."""
        reset_row(self.runtime.config, self._cache, row)

    def clear(self) -> None:
        """Drop all streams and what they left behind."""
        self.positions = []
        self._cache.reset()

    def _bound(self, batch: int) -> BoundPrograms:
        if batch not in self._programs:
            first = [tensor[:batch] for tensor in self._cache.tensors()]
            self._programs[batch] = self.runtime.bind(ModelCache.from_tensors(self.runtime.config, first))
        return self._programs[batch]
