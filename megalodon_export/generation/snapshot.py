"""Snapshots: the state of a stream, in memory or in a safetensors file. Python and C++ read and write the same files.

A snapshot holds the filled slots of each ring alone. A ring is empty where a chunk ends, so a snapshot is small there.
With C = 4 slots:

    position   4    5    6    7    8
    slots      0    1    2    3    0     filled: position mod C
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..bundles.files import write_whole
from ..exporters.programs import dtype_name
from ..model import CacheTensor, ModelCache, ModelConfig, cache_layout, dimension_sizes
from ..model.cache import RING_DIM
from . import snapshot_file

_MAX_POSITION = 2**53 - 1  # the largest whole number that every JSON reader and float64 hold exactly


@dataclass(frozen=True)
class Snapshot:
    """A stream's state on the host.

    tensors: by the names of the cache layout, for a batch of 1; rings hold their filled slots
    pending: the token that was returned but not fed yet
    model: the sha256 of the model's weights file
    """

    tensors: dict[str, Tensor]
    pending: int | None
    model: str

    @classmethod
    def of(cls, config: ModelConfig, cache: ModelCache, pending: int | None, model: str) -> Snapshot:
        """Copy the state in a cache of one stream."""
        filled = _filled_slots(config, cache, int(cache.position[0]))
        return cls({name: tensor.detach().to("cpu", copy=True) for name, tensor in filled}, pending, model)

    def check(self, config: ModelConfig, dtype: torch.dtype, model: str) -> None:
        """ValueError unless this is a state of the model `model`, which has this config and dtype.

        The C++ library (cpp/src/generation/snapshot.cpp) makes the same checks in the same order and the same words.
        """
        if self.model != model:
            raise ValueError("the snapshot is of another model; restore it in a session of the model that it is of")
        layout, sizes = cache_layout(config), dimension_sizes(config)
        self._check_names(layout)
        for tensor in layout:
            _check_shape(tensor, self.tensors[tensor.name], sizes)
        for tensor in layout:
            found, expected = self.tensors[tensor.name].dtype, tensor.torch_dtype(dtype)
            if found != expected:
                raise ValueError(
                    f"{tensor.name} of the snapshot is {dtype_name(found)}, expected {dtype_name(expected)}; "
                    "take it again"
                )
        self._check_values(layout, sizes[RING_DIM])
        if self.pending is not None and (type(self.pending) is not int or not 0 <= self.pending < config.vocab_size):
            raise ValueError(
                f"the snapshot's pending token is {self.pending!r}, expected none or a token id in "
                f"0..{config.vocab_size - 1}; take it again"
            )

    def copy_to(self, config: ModelConfig, cache: ModelCache) -> None:
        """Put the state, which `check` has accepted, into a cache of one stream."""
        position = int(self.tensors["final.position"][0])
        for layout, tensor in zip(cache_layout(config), cache.tensors(), strict=True):
            if RING_DIM in layout.dims:
                tensor.fill_(layout.fill)
        for name, tensor in _filled_slots(config, cache, position):
            tensor.copy_(self.tensors[name].detach())

    def to_bytes(self) -> bytes:
        """The content of the snapshot's file."""
        return snapshot_file.encode(self.tensors, self.pending, self.model)

    @classmethod
    def from_bytes(cls, content: bytes, name: str = "the snapshot") -> Snapshot:
        """The snapshot in the content of a file, which messages call `name`.

        ValueError unless `to_bytes` made it.
        """
        return cls(*snapshot_file.decode(content, name))

    def save(self, path: str | Path) -> None:
        """Write a file, whole or not at all; OSError, which names the path, if that fails."""
        write_whole(Path(path), self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> Snapshot:
        """Read a file that `save` wrote.

        OSError if it cannot be read, ValueError if it is something else.
        """
        try:
            if os.path.exists(path) and not os.path.isfile(path):
                raise ValueError(f"{path} is no snapshot: a regular file expected")
            content = Path(path).read_bytes()
        except OSError as error:
            raise type(error)(f"{path} cannot be opened: {error.strerror}") from error
        return cls.from_bytes(content, str(path))

    def _check_names(self, layout: tuple[CacheTensor, ...]) -> None:
        names = {tensor.name: None for tensor in layout}
        for name in names:
            if name not in self.tensors:
                raise ValueError(f"the snapshot has no {name}; take it again")
        for name in sorted(self.tensors.keys() - names.keys(), key=str):
            raise ValueError(f"the snapshot has a tensor {name!r}, and the model's cache has none; take it again")

    def _check_values(self, layout: tuple[CacheTensor, ...], slots: int) -> None:
        for name in (t.name for t in layout):
            if not _is_finite(self.tensors[name]):
                raise ValueError(f"{name} of the snapshot has values that are not finite; take it again")
        for name in (t.name for t in layout if t.name.endswith(".norm_var")):
            if (self.tensors[name] < 0).any():
                raise ValueError(f"{name} of the snapshot has a negative variance; take it again")
        position = int(self.tensors["final.position"][0])
        if not 0 <= position <= _MAX_POSITION:
            raise ValueError(
                f"final.position of the snapshot is {position}, expected 0..{_MAX_POSITION}; take it again"
            )
        for tensor in (t for t in layout if RING_DIM in t.dims):
            found = self.tensors[tensor.name].shape[tensor.dims.index(RING_DIM)]
            if found != position % slots:
                raise ValueError(
                    f"{tensor.name} of the snapshot has {found} slots, expected {position % slots} of {slots} at "
                    f"position {position}; take it again"
                )


def copy_state(config: ModelConfig, source: ModelCache, target: ModelCache) -> None:
    """Copy the state of one stream to a cache in which the stream is fresh."""
    position = int(source.position[0])
    for (_, old), (_, new) in zip(
        _filled_slots(config, target, position), _filled_slots(config, source, position), strict=True
    ):
        old.copy_(new)


def _filled_slots(config: ModelConfig, cache: ModelCache, position: int) -> Iterator[tuple[str, Tensor]]:
    """Views of a cache's tensors, by name: of rings the slots that are filled at a position."""
    for layout, tensor in zip(cache_layout(config), cache.tensors(), strict=True):
        if RING_DIM in layout.dims:
            yield layout.name, tensor.narrow(layout.dims.index(RING_DIM), 0, position % cache.slots)
        else:
            yield layout.name, tensor


def _is_finite(tensor: Tensor) -> bool:
    # One pass without temporary tensors: NaN is both the minimum and the maximum where there is one.
    return tensor.numel() == 0 or all(math.isfinite(end) for end in torch.aminmax(tensor.detach()))


def _check_shape(layout: CacheTensor, tensor: Tensor, sizes: dict[str, int]) -> None:
    if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.layout is not torch.strided:
        raise ValueError(f"{layout.name} of the snapshot is no tensor of values; take it again")
    shape, found = list(layout.shape(sizes, 1)), list(tensor.shape)
    right = len(found) == len(shape) and all(
        size < expected if dim == RING_DIM else size == expected
        for dim, size, expected in zip(layout.dims, found, shape, strict=True)
    )
    if not right:
        wanted = ", ".join(
            f"0..{size - 1}" if dim == RING_DIM else str(size) for dim, size in zip(layout.dims, shape, strict=True)
        )
        raise ValueError(f"{layout.name} of the snapshot has the shape {found}, expected [{wanted}]; take it again")


def layout_id(config: ModelConfig) -> str:
    """A short hash of the cache layout."""
    sizes = dimension_sizes(config)
    layout = [(t.name, t.shape(sizes, 1), t.dtype) for t in cache_layout(config)]
    return hashlib.sha256(json.dumps(layout).encode()).hexdigest()[:16]


def state_size(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one stream's cache."""
    sizes = dimension_sizes(config)
    return sum(t.torch_dtype(dtype).itemsize * torch.Size(t.shape(sizes, 1)).numel() for t in cache_layout(config))
