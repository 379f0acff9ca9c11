"""Snapshots: the state of a stream, in memory or in a safetensors file that every runtime reads."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..model import ModelCache, ModelConfig, cache_layout, dimension_sizes

_FORMAT = "megalodon-export snapshot 1"


@dataclass(frozen=True)
class Snapshot:
    """Tensors by the names of the cache layout (batch 1), and the token that was returned but not fed yet."""

    tensors: dict[str, Tensor]
    pending: int | None
    model: str

    @classmethod
    def of(cls, config: ModelConfig, cache: ModelCache, pending: int | None) -> Snapshot:
        """Copy a cache."""
        names = [t.name for t in cache_layout(config)]
        copies = [t.detach().to("cpu", copy=True) for t in cache.tensors()]
        return cls(dict(zip(names, copies, strict=True)), pending, layout_id(config))

    def copy_to(self, config: ModelConfig, cache: ModelCache) -> None:
        """Put the state into a cache; ValueError if the snapshot is of a model with another cache."""
        if self.model != layout_id(config):
            raise ValueError(
                "the snapshot is of a model with another cache layout; restore it in a session of that model"
            )
        source = ModelCache.from_tensors(config, [self.tensors[t.name] for t in cache_layout(config)])
        cache.copy_(source)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        metadata = {"format": _FORMAT, "model": self.model, "pending": json.dumps(self.pending)}
        save_file(self.tensors, path, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Snapshot:
        """Read a file that `save` wrote; ValueError if it is something else."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise ValueError(f"{path} is no snapshot, or not a whole one: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path} is no snapshot: its format is {metadata.get('format')!r}, expected {_FORMAT!r}")
        return cls(tensors, json.loads(metadata["pending"]), metadata["model"])


def layout_id(config: ModelConfig) -> str:
    """A short hash of the cache layout: equal for models whose states can be exchanged."""
    sizes = dimension_sizes(config)
    layout = [(t.name, t.shape(sizes, 1), t.dtype) for t in cache_layout(config)]
    return hashlib.sha256(json.dumps(layout).encode()).hexdigest()[:16]


def state_size(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one stream's cache."""
    sizes = dimension_sizes(config)
    return sum(t.torch_dtype(dtype).itemsize * torch.Size(t.shape(sizes, 1)).numel() for t in cache_layout(config))
