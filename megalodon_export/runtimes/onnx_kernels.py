"""Graphs with kernels in ONNX Runtime: where they run, and how a step that changes the cache in place is captured."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bundles.manifest import Manifest
from ..exporters.manifest_types import Graph
from ..exporters.onnx_names import KERNEL_LIBRARY, kernel_boundary
from ..exporters.programs import ProgramName, program_specs
from ..model import ModelCache
from ..model.cache import copy_in_place
from .cuda_graph import MAX_PREFILLS, MOST_TOKENS

_OLDEST_GPU = (8, 0)
# ONNX Runtime runs a graph some times before it captures it, within one call: three times in 1.31.
_MOST_RUNS = 8


def suit(folder: Path, manifest: Manifest, device: torch.device) -> bool:
    """Whether a bundle has graphs with kernels, and the device can run them.

    The library is native code. Only a bundle that is not sealed yet, which is being made, may have it unlisted.
    """
    there = KERNEL_LIBRARY in manifest.files if manifest.files else (folder / KERNEL_LIBRARY).is_file()
    if not there or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= _OLDEST_GPU


def kernel_graphs(manifest: Manifest) -> dict[ProgramName, Graph]:
    """The graphs with kernels of a bundle: their files, inputs and outputs."""
    assert manifest.programs.onnx is not None
    specs = program_specs(manifest.config, manifest.torch_dtype, manifest.programs.onnx.all_logits)
    return {name: kernel_boundary(spec) for name, spec in specs.items()}


def captured_in_place(run: Callable[[], None], cache: ModelCache, others: Sequence[Tensor]) -> None:
    """Let ONNX Runtime capture a step that changes the cache and others in place; both are then as they were.

    Capturing runs the step several times. Each moves every row's position on by one and writes the next slot of its
    rings, so those slots are kept: they may hold tokens of the chunk before, which are still read.
    """
    states = [*cache.states(), *others]
    before = [tensor.clone() for tensor in states]
    chunk = cache.rings()[0].shape[2]
    rows = torch.arange(cache.batch, device=cache.position.device)[:, None]
    slots = (cache.position[:, None] + torch.arange(min(_MOST_RUNS, chunk), device=rows.device)) % chunk
    overwritten = [ring[rows, :, slots].clone() for ring in cache.rings()]
    run()
    copy_in_place(states, before)
    for ring, old in zip(cache.rings(), overwritten, strict=True):
        ring[rows, :, slots] = old


class CapturedGraphs:
    """The captured prefills of one cache by their size (B, L), each with the tensors that it reads its arguments from.

    The least recently used one makes room. With many tokens the GPU takes longer than the host needs for launches, and
    nothing is captured.
    """

    def __init__(self) -> None:
        self.graphs: OrderedDict[tuple[int, ...], tuple[Any, dict[str, Tensor]]] = OrderedDict()
        self._seen: set[tuple[int, ...]] = set()

    def is_due(self, size: tuple[int, ...]) -> bool:
        """Whether a size has come before, so that it is worth being captured."""
        if size in self.graphs:
            self.graphs.move_to_end(size)
            return True
        due = size in self._seen and math.prod(size) <= MOST_TOKENS
        self._seen.add(size)
        return due

    def add(self, size: tuple[int, ...], graph: Any, arguments: dict[str, Tensor]) -> None:
        """Keep a captured prefill."""
        if len(self.graphs) == MAX_PREFILLS:
            self.graphs.popitem(last=False)
        self.graphs[size] = graph, arguments
