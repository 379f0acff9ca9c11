"""CUDA graphs over one cache: a decode step, captured once and replayed for every token; prefills, one per size."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model import ModelCache
from ..model.cache import copy_in_place
from .cuda_driver import use_dependent_launch

MOST_TOKENS = 4096  # B * L of a captured prefill; with more, the GPU takes longer than the host needs for launches
MAX_PREFILLS = 8  # captured prefills of one cache; the least recently used one makes room

RunPrefill = Callable[[Tensor, Tensor], Tensor]


class CapturedStep:
    """A step that feeds one token to every row of a cache, captured; calling it replays it.

    `step` may read and write the cache and `others`, which stay where they are, and nothing else. Capturing leaves
    them as they were.
    """

    def __init__(self, step: Callable[[], object], cache: ModelCache, others: Sequence[Tensor] = ()) -> None:
        device = cache.position.device
        states = [*cache.states(), *others]
        before = [tensor.clone() for tensor in states]
        rows = torch.arange(cache.batch, device=device)
        slots = cache.position % cache.slots
        overwritten = [ring[rows, :, slots] for ring in cache.rings()]  # not whole rings, which may fill the memory
        cuda_stream = torch.cuda.Stream(device)
        cuda_stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(cuda_stream):  # warm-up: libraries allocate their workspaces outside the capture
            for _ in range(2):
                step()
                copy_in_place(states, before)  # or the second step would write another slot
        torch.cuda.current_stream(device).wait_stream(cuda_stream)
        for ring, old in zip(cache.rings(), overwritten, strict=True):
            ring[rows, :, slots] = old
        self._graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(self._graph):
            step()
        use_dependent_launch(self._graph)
        self._graph.instantiate()

    def __call__(self) -> None:
        """Run the step once."""
        self._graph.replay()


class CapturedDecode:
    """A decode program captured over one cache."""

    def __init__(self, run: Callable[[Tensor], Tensor], cache: ModelCache) -> None:
        self._token_ids = torch.zeros(cache.batch, dtype=torch.int64, device=cache.position.device)
        self._step = CapturedStep(lambda: self._decode(run), cache)

    def _decode(self, run: Callable[[Tensor], Tensor]) -> None:
        self._logits = run(self._token_ids)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Logits (B, V) in a buffer that the next call overwrites."""
        self._token_ids.copy_(token_ids)
        self._step()
        return self._logits


class CapturedPrefills:
    """A prefill program over one cache, captured for each size (B, L) that comes a second time, and replayed then.

    At the first call of a size the program runs uncaptured, which loads its kernels. Capturing then runs no kernel, so
    it leaves the cache alone.
    """

    def __init__(self) -> None:
        self._seen: set[torch.Size] = set()
        self._captured: OrderedDict[torch.Size, _CapturedPrefill] = OrderedDict()
        self._pool: Any = None  # one pool of memory: no two of the graphs run at a time, and results are copied out

    def __call__(self, run: RunPrefill, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """The logits of `run`, which is the same program at every call, in a tensor of the caller's own."""
        size = token_ids.shape
        if size not in self._captured:
            if size not in self._seen or token_ids.numel() > MOST_TOKENS:
                self._seen.add(size)
                return run(token_ids, lengths)
            if len(self._captured) == MAX_PREFILLS:
                self._captured.popitem(last=False)
            self._captured[size] = _CapturedPrefill(run, token_ids, lengths, self._pool)
            self._pool = self._captured[size].graph.pool()
        self._captured.move_to_end(size)
        return self._captured[size](token_ids, lengths)


class _CapturedPrefill:
    def __init__(self, run: RunPrefill, token_ids: Tensor, lengths: Tensor, pool: Any) -> None:
        self._token_ids, self._lengths = token_ids.clone(), lengths.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self._logits = run(self._token_ids, self._lengths)

    def __call__(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        self._token_ids.copy_(token_ids)
        self._lengths.copy_(lengths)
        self.graph.replay()
        return self._logits.clone()
