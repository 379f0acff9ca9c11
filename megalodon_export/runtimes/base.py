"""The interface of every runtime: weights and programs on one device, caches for them, and `bind`."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..exporters.programs import Limits, dtype_name
from ..generation.arguments import is_integer, show
from ..model import ModelCache, ModelConfig, cache_layout, dimension_sizes
from .ambient import check_process, in_plain_modes, opening_process
from .bound_programs import BoundPrograms


class RuntimeUnavailable(Exception):
    """A bundle's programs cannot run on this machine, or the bundle has none for the runtime."""


def require_device(device: torch.device) -> None:
    """RuntimeUnavailable unless this machine has the device, and torch can use it."""
    if device.type != "cuda":
        return
    if not torch.cuda.is_available():
        raise RuntimeUnavailable(f"{device} needs a GPU and a torch with CUDA, and there is none here; use the CPU")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise RuntimeUnavailable(f"there is no {device}: the GPUs here are 0..{torch.cuda.device_count() - 1}")


class Runtime(ABC):
    """Weights and programs of one model on one device.

    A subclass is made from `(folder, manifest, device)`. It loads weights and programs, raises RuntimeUnavailable where
    they cannot run, and calls this `__init__`. Its `_bind` returns a subclass of `BoundPrograms`.

    limits: the sizes that one call of a program takes; `BoundPrograms.prefill` splits longer prompts.
    all_logits: whether the prefill program computes the logits of every token, not of the last one alone.
    can_score: whether `BoundPrograms.score` works.
    model_id: a fingerprint of the weights, equal for bundles of the same weights; snapshots name their model by it.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        limits: Limits,
        all_logits: bool,
        model_id: str,
    ) -> None:
        self._process = opening_process()
        self.config, self.dtype, self.device, self.model_id = config, dtype, device, model_id
        self.limits, self.all_logits, self.can_score = limits, all_logits, all_logits
        sizes = dimension_sizes(config)
        self._layout = [(t.name, t.shape(sizes, 1)[1:], t.torch_dtype(dtype)) for t in cache_layout(config)]

    def check_process(self) -> None:
        """ForkedProcess in a child of os.fork() of the process that opened the runtime."""
        check_process(self._process)

    @in_plain_modes
    def new_cache(self, batch: int = 1) -> ModelCache:
        """A fresh cache for `batch` streams; ValueError beyond what the programs take."""
        self._check_batch(batch)
        return ModelCache.allocate(self.config, batch, self.dtype, self.device)

    @in_plain_modes
    def bind(self, cache: ModelCache, capture: bool = True) -> BoundPrograms:
        """The programs over one cache. `capture=False` keeps them out of CUDA graphs, which changes no result.

        ValueError for a cache that `new_cache` would not make: compiled programs trust addresses, and would read and
        write out of its bounds.
        """
        self.check_process()
        self._check_cache(cache)
        return self._bind(cache, capture and self.device.type == "cuda")

    @abstractmethod
    def _bind(self, cache: ModelCache, capture: bool) -> BoundPrograms:
        """`bind` for a checked cache. `capture`: on a GPU, and wanted."""

    def named_tensors(self, cache: ModelCache) -> dict[str, Tensor]:
        """The tensors of a cache by the names of the layout."""
        return dict(zip((name for name, *_ in self._layout), cache.tensors(), strict=True))

    def _check_batch(self, batch: int) -> None:
        if not is_integer(batch):
            raise ValueError(f"a batch of {show(batch)} is none, expected an integer in 1..{self.limits.max_batch}")
        if not 1 <= batch <= self.limits.max_batch:
            raise ValueError(
                f"a batch of {batch} is outside 1..{self.limits.max_batch}, which this bundle was exported for; "
                "export with a larger --max-batch, or run smaller batches"
            )

    def _check_cache(self, cache: ModelCache) -> None:
        batch, tensors = cache.batch, cache.tensors()
        self._check_batch(batch)
        if len(tensors) != len(self._layout):
            raise ValueError(f"the cache has {len(tensors)} tensors, expected {len(self._layout)}; use new_cache")
        for (name, shape, dtype), tensor in zip(self._layout, tensors, strict=True):
            right = tensor.shape == (batch, *shape) and tensor.dtype == dtype and tensor.is_contiguous()
            if not right or tensor.device.type != self.device.type:
                raise ValueError(
                    f"{name} of the cache is {dtype_name(tensor.dtype)} {list(tensor.shape)} on {tensor.device}, "
                    f"strides {list(tensor.stride())}; expected {dtype_name(dtype)} {[batch, *shape]}, contiguous, "
                    f"on {self.device.type}; use new_cache"
                )
