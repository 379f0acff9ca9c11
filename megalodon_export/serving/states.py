"""The state of one stream, apart from the batch that it runs in. It is copied into a row of a cache and out of one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..generation.snapshot import Snapshot
from ..model import ModelCache, ModelConfig, cache_layout
from ..model.cache import RING_DIM


@dataclass(frozen=True)
class StreamState:
    """A copy of a stream's state, on any device.

    tensors: in the order of the cache layout, for a batch of 1; rings hold their filled slots
    position: the tokens that the stream has been fed
    logits: (V) float32 after the last of them, or None where nobody kept them
    """

    tensors: tuple[Tensor, ...]
    position: int
    logits: Tensor | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        held = [*self.tensors, *([] if self.logits is None else [self.logits])]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def to(self, device: torch.device | str) -> StreamState:
        """The same state on another device."""
        logits = None if self.logits is None else self.logits.to(device)
        return StreamState(tuple(tensor.to(device) for tensor in self.tensors), self.position, logits)

    def snapshot(self, config: ModelConfig, pending: int | None, model: str) -> Snapshot:
        """The state as a snapshot, which sessions in Python and C++ restore."""
        host = self.to("cpu").tensors
        return Snapshot({t.name: one for t, one in zip(cache_layout(config), host, strict=True)}, pending, model)

    @classmethod
    def of_snapshot(cls, config: ModelConfig, snapshot: Snapshot) -> StreamState:
        """The state in a snapshot that `Snapshot.check` has accepted."""
        tensors = tuple(snapshot.tensors[t.name] for t in cache_layout(config))
        return cls(tensors, int(snapshot.tensors["final.position"][0]))


class StateCopier:
    """Copies states into rows of caches of one model, and out of them."""

    def __init__(self, config: ModelConfig) -> None:
        self._ring_dims = [t.dims.index(RING_DIM) if RING_DIM in t.dims else None for t in cache_layout(config)]

    def take(self, cache: ModelCache, row: int, position: int, logits: Tensor | None = None) -> StreamState:
        """A copy of a row, whose stream has been fed `position` tokens."""
        kept = tuple(view.clone() for view in self._views(cache, row, position))
        return StreamState(kept, position, None if logits is None else logits.clone())

    def put(self, state: StreamState, cache: ModelCache, row: int) -> None:
        """Make a row the stream of a state. Slots that the state does not fill keep what nobody reads any more."""
        for view, tensor in zip(self._views(cache, row, state.position), state.tensors, strict=True):
            view.copy_(tensor)

    def move(self, cache: ModelCache, source: int, target: int, position: int) -> None:
        """Copy a row, whose stream has been fed `position` tokens, over another one."""
        views = self._views(cache, target, position), self._views(cache, source, position)
        for new, old in zip(*views, strict=True):
            new.copy_(old)

    def _views(self, cache: ModelCache, row: int, position: int) -> list[Tensor]:
        """A row's tensors, of rings the filled slots."""
        filled = position % cache.slots
        views = [tensor[row : row + 1] for tensor in cache.tensors()]
        return [
            view if dim is None else view.narrow(dim, 0, filled)
            for view, dim in zip(views, self._ring_dims, strict=True)
        ]


def reset_row(config: ModelConfig, cache: ModelCache, row: int) -> None:
    """Make a row a fresh stream. A row that has held NaN must be reset before another stream uses it."""
    for layout, tensor in zip(cache_layout(config), cache.tensors(), strict=True):
        tensor[row].fill_(layout.fill)
