"""Decode as a CUDA graph: captured once for a cache, replayed for every token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..model import MegalodonCache
from ..model.cache import copy_in_place


class CapturedDecode:
    """A decode program captured over one cache, whose tensors it updates at every replay."""

    def __init__(self, run: Callable[[Tensor, MegalodonCache], Tensor], cache: MegalodonCache) -> None:
        device = cache.position.device
        self.token_ids = torch.zeros(cache.batch, dtype=torch.int64, device=device)
        before = [tensor.clone() for tensor in cache.tensors()]
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # warm-up: libraries allocate their workspaces outside the capture
            for _ in range(2):
                run(self.token_ids, cache)
        torch.cuda.current_stream(device).wait_stream(stream)
        copy_in_place(cache.tensors(), before)  # the warm-up moved the stream on
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = run(self.token_ids, cache)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Logits (B, V) in a buffer that the next call overwrites."""
        self.token_ids.copy_(token_ids)
        self.graph.replay()
        return self.logits
