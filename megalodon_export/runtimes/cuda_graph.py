"""Programs over a cache as CUDA graphs: a decode step, captured once and replayed for every token; prefills by size."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model import MegalodonCache
from ..model.cache import copy_in_place
from .programmatic import overlap_kernels


class CapturedStep:
    """A step that feeds one token to every row of a cache, captured; calling it replays it.

    `step` may read and write tensors that stay where they are, and nothing else: the cache, and `others`. Capturing
    leaves them as they were.
    """

    def __init__(self, step: Callable[[], object], cache: MegalodonCache, others: Sequence[Tensor] = ()) -> None:
        device = cache.position.device
        states = [*cache.states(), *others]
        before = [tensor.clone() for tensor in states]
        rows = torch.arange(cache.batch, device=device)
        slots = cache.position % cache.rings()[0].shape[2]
        overwritten = [ring[rows, :, slots] for ring in cache.rings()]  # not whole rings, which may fill the memory
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # warm-up: libraries allocate their workspaces outside the capture
            for _ in range(2):
                step()
                copy_in_place(states, before)  # or the second one would write another slot
        torch.cuda.current_stream(device).wait_stream(stream)
        for ring, old in zip(cache.rings(), overwritten, strict=True):
            ring[rows, :, slots] = old
        self._graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(self._graph):
            step()
        overlap_kernels(self._graph)
        self._graph.instantiate()

    def __call__(self) -> None:
        """Run the step once."""
        self._graph.replay()


class CapturedDecode:
    """A decode program captured over one cache."""

    def __init__(self, run: Callable[[Tensor, MegalodonCache], Tensor], cache: MegalodonCache) -> None:
        self.token_ids = torch.zeros(cache.batch, dtype=torch.int64, device=cache.position.device)
        self._step = CapturedStep(lambda: self._decode(run, cache), cache)

    def _decode(self, run: Callable[[Tensor, MegalodonCache], Tensor], cache: MegalodonCache) -> None:
        self.logits = run(self.token_ids, cache)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Logits (B, V) in a buffer that the next call overwrites."""
        self.token_ids.copy_(token_ids)
        self._step()
        return self.logits


_MOST_TOKENS = 4096  # of a captured prefill: with more, the device is busy for longer than the host launches
_KEPT = 8  # captured prefills of one cache

RunPrefill = Callable[[Tensor, Tensor, MegalodonCache], Tensor]


class CapturedPrefills:
    """A prefill program over one cache, captured for each size (B, L) that comes a second time, and replayed then.

    The first time it runs as it is, which loads its kernels; a capture then runs nothing, and leaves the cache alone.
    """

    def __init__(self, run: RunPrefill) -> None:
        self._run = run
        self._seen: set[torch.Size] = set()
        self._captured: OrderedDict[torch.Size, _CapturedPrefill] = OrderedDict()
        self._pool: Any = None  # of memory: no two of the graphs run at a time, and results are copied out

    def __call__(self, token_ids: Tensor, lengths: Tensor, cache: MegalodonCache) -> Tensor:
        """The program's logits, the caller's own. The cache is the same at every call."""
        size = token_ids.shape
        if size not in self._captured:
            if size not in self._seen or token_ids.numel() > _MOST_TOKENS:
                self._seen.add(size)
                return self._run(token_ids, lengths, cache)
            if len(self._captured) == _KEPT:
                self._captured.popitem(last=False)
            self._captured[size] = _CapturedPrefill(self._run, token_ids, lengths, cache, self._pool)
            self._pool = self._captured[size].graph.pool()
        self._captured.move_to_end(size)
        return self._captured[size](token_ids, lengths)


class _CapturedPrefill:
    def __init__(self, run: RunPrefill, token_ids: Tensor, lengths: Tensor, cache: MegalodonCache, pool: Any) -> None:
        self._token_ids, self._lengths = token_ids.clone(), lengths.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self._logits = run(self._token_ids, self._lengths, cache)

    def __call__(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        self._token_ids.copy_(token_ids)
        self._lengths.copy_(lengths)
        self.graph.replay()
        return self._logits.clone()
