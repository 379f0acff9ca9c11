"""The cache: everything a stream needs to go on, in a fixed list of tensors. This file is its only definition.

The dataclasses below *are* the layout: names, shapes, dtypes, initial values and meanings. The model, the exported
programs, the manifest, the sessions and every runtime derive from `cache_layout`; none lists a tensor itself.

A ring of C slots holds the keys and values of the current chunk. With C = 4, after tokens 0..5:

    slot    0  1  2  3
    token   4  5  2  3     tokens 4 and 5 are visible; 2 and 3 belong to the chunk before and will be overwritten
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor

from .config import ModelConfig


def tensor_field(dims: str, dtype: str, meaning: str, fill: float = 0.0) -> Any:
    """A field of a cache dataclass: the letters of its dimensions, its dtype, what it holds, and its initial value.

    `dims` are letters or numbers with spaces between them, such as "B D N 2". `dtype` is "model" (the model's own),
    "float32" or "int64".
    """
    return field(metadata={"dims": tuple(dims.split()), "dtype": dtype, "meaning": meaning, "fill": fill})


@dataclass
class LayerCache:
    """State of one layer. `key` and `value` are rings: the token at position t sits in slot t mod C."""

    key: Tensor = tensor_field("B H C dz", "model", "rotated keys of the current chunk, slot t mod C")
    value: Tensor = tensor_field("B H C dv", "model", "values of the current chunk, slot t mod C")
    ema_state: Tensor = tensor_field("B D N 2", "float32", "complex EMA state (real, imaginary)")
    norm_mean: Tensor = tensor_field("B G", "float32", "running mean of the layer's TimestepNorm")
    norm_var: Tensor = tensor_field("B G", "float32", "running variance of the layer's TimestepNorm", fill=1.0)

    @property
    def slots(self) -> int:
        """Slots of each of the two rings."""
        return self.key.shape[2]

    def tensors(self) -> list[Tensor]:
        """The tensors in the order of the layout; not copies."""
        return [getattr(self, f.name) for f in fields(self)]

    def clone(self) -> LayerCache:
        """An independent copy."""
        return LayerCache(*(t.clone() for t in self.tensors()))

    def store_states(self, norm_mean: Tensor, norm_var: Tensor, ema_state: Tensor) -> None:
        """Replace everything but the rings, in place; not part of the autograd graph."""
        self.norm_mean.copy_(norm_mean.detach())
        self.norm_var.copy_(norm_var.detach())
        self.ema_state.copy_(ema_state.detach())


@dataclass
class FinalCache:
    """State that exists once: the final TimestepNorm's, and the tokens seen, which every norm counts by."""

    norm_mean: Tensor = tensor_field("B G", "float32", "running mean of the final TimestepNorm")
    norm_var: Tensor = tensor_field("B G", "float32", "running variance of the final TimestepNorm", fill=1.0)
    position: Tensor = tensor_field("B", "int64", "tokens seen, per row")

    def store_states(self, norm_mean: Tensor, norm_var: Tensor) -> None:
        """Replace the statistics, in place; not part of the autograd graph."""
        self.norm_mean.copy_(norm_mean.detach())
        self.norm_var.copy_(norm_var.detach())


RING_DIM = "C"  # of the slots of a ring; a tensor without it is a state


@dataclass(frozen=True)
class CacheTensor:
    """One tensor of the cache: its name, its dimensions (letters; B is the batch), dtype, initial value, meaning."""

    name: str
    dims: tuple[str, ...]
    dtype: str  # "model" (the model's own), "float32" or "int64"
    fill: float
    meaning: str

    def shape(self, sizes: dict[str, int], batch: int) -> tuple[int, ...]:
        """The concrete shape for a batch size, with `sizes` from `dimension_sizes`."""
        known = {**sizes, "B": batch}
        return tuple(known[d] if d in known else int(d) for d in self.dims)

    def torch_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The concrete dtype. A float64 model (tests) keeps its statistics in float64 as well."""
        if self.dtype == "int64":
            return torch.int64
        return model_dtype if self.dtype == "model" or model_dtype == torch.float64 else torch.float32


# Read once from the dataclasses: torch.compile cannot read their fields where a pass allocates its cache.
_LAYER, _FINAL = (
    tuple(CacheTensor(name=f.name, **f.metadata) for f in fields(part)) for part in (LayerCache, FinalCache)
)


def dimension_sizes(config: ModelConfig) -> dict[str, int]:
    """The size of each letter of the layout in a model, all but B, the batch: {"H": 1, "C": 2048, "dz": 256 ...}."""
    return {
        "H": config.num_heads,
        RING_DIM: config.max_cache_len or config.chunk_size,  # an unbounded ring grows from a chunk
        "dz": config.z_head_dim,
        "dv": config.value_head_dim,
        "D": config.model_dim,
        "N": config.cema_ndim,
        "G": config.norm_num_groups,
    }


def cache_layout(config: ModelConfig) -> tuple[CacheTensor, ...]:
    """Every tensor of the cache in its canonical order: layer by layer, then the final ones."""
    layout = [(f"layers.{i}", t) for i in range(config.num_layers) for t in _LAYER]
    layout += [("final", t) for t in _FINAL]
    return tuple(CacheTensor(f"{part}.{t.name}", t.dims, t.dtype, t.fill, t.meaning) for part, t in layout)


@dataclass(eq=False)
class ModelCache:
    """The cache of a batch of streams. Every tensor's first dimension is the batch, and its rows are independent.

    A forward pass updates the tensors in place, so a caller's references stay valid and programs may hold addresses.

        cache = model.new_cache(2)                             # two streams at position 0
        model.prefill(token_ids, torch.tensor([5, 3]), cache)  # cache.position is now [5, 3]
        model.decode(next_ids, cache)                          # and [6, 4]
    """

    layers: list[LayerCache]
    final: FinalCache

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        batch: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        layer_devices: Sequence[torch.device | str] = (),
    ) -> Self:
        """A fresh cache for `batch` streams at position 0.

        Keys and values are in `dtype`. `layer_devices` has a device for each layer where they differ from `device`.
        """
        sizes = dimension_sizes(config)
        devices = [d for d in layer_devices or [device] * config.num_layers for _ in _LAYER] + [device] * len(_FINAL)
        return cls.from_tensors(
            config,
            [
                torch.full(t.shape(sizes, batch), t.fill, dtype=t.torch_dtype(dtype), device=where)
                for t, where in zip(cache_layout(config), devices, strict=True)
            ],
        )

    @classmethod
    def from_tensors(cls, config: ModelConfig, tensors: Sequence[Tensor]) -> Self:
        """A cache over existing tensors, given in the order of `cache_layout`; they are not copied."""
        per_layer = len(_LAYER)
        count = config.num_layers * per_layer
        layers = [LayerCache(*tensors[i : i + per_layer]) for i in range(0, count, per_layer)]
        return cls(layers, FinalCache(*tensors[count:]))

    def tensors(self) -> list[Tensor]:
        """The tensors in the order of `cache_layout`; not copies."""
        return [tensor for tensor, _ in self._fields()]

    def replace(self, tensors: Sequence[Tensor]) -> None:
        """Hold other tensors, in the order of `cache_layout`; they are not copied."""
        replaced = iter(tensors)
        parts: list[LayerCache | FinalCache] = [*self.layers, self.final]
        for part in parts:
            for f in fields(part):
                setattr(part, f.name, next(replaced))

    def rings(self) -> list[Tensor]:
        """The keys and values.

        A decode step writes slot `position mod C` of each before it reads it, so running the step again from the same
        states writes the same values.
        """
        return [tensor for tensor, f in self._fields() if RING_DIM in f.metadata["dims"]]

    def states(self) -> list[Tensor]:
        """Everything but the rings. These tensors are small, and a decode step replaces them whole."""
        return [tensor for tensor, f in self._fields() if RING_DIM not in f.metadata["dims"]]

    def _fields(self) -> Iterator[tuple[Tensor, Field[Any]]]:
        parts: list[LayerCache | FinalCache] = [*self.layers, self.final]
        return ((getattr(part, f.name), f) for part in parts for f in fields(part))

    @property
    def position(self) -> Tensor:
        """Tokens seen by each row, (B) int64."""
        return self.final.position

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.position.shape[0]

    @property
    def slots(self) -> int:
        """Slots of each ring: a chunk's tokens, unless the model's attention reaches beyond the chunk."""
        return self.layers[0].slots

    def clone(self, config: ModelConfig) -> Self:
        """An independent copy."""
        return self.from_tensors(config, [t.clone() for t in self.tensors()])

    def reset(self) -> None:
        """Make every row a fresh stream, in place."""
        for tensor, f in self._fields():
            tensor.fill_(f.metadata["fill"])

    def copy_(self, other: ModelCache) -> None:
        """Take over the contents of another cache of the same shapes, in place."""
        copy_in_place(self.tensors(), other.tensors())

    def rows(self, config: ModelConfig, index: Tensor) -> Self:
        """A new cache of the chosen rows, (B') int64, in that order: it forks streams, or reorders beams."""
        return self.from_tensors(config, [t.index_select(0, index) for t in self.tensors()])


def copy_in_place(destination: Iterable[Tensor], source: Iterable[Tensor]) -> None:
    """Copy tensor by tensor, keeping the destination's storage."""
    for old, new in zip(destination, source, strict=True):
        old.copy_(new)
