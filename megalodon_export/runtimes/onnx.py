"""ONNX Runtime on a bundle's graphs: on a CPU, or on CUDA with every node there.

Keys and values are updated in place: one buffer is a graph's input and its output. The small states leave a run in
buffers of their own and are copied back, so that a run changes nothing that it reads but one invisible slot of the
rings: run twice, as ONNX Runtime does where it captures a CUDA graph, it gives what it gives run once.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch  # before onnxruntime, which finds CUDA's libraries among those that torch has loaded
from torch import Tensor

from ..bundles.manifest import Manifest
from ..exporters.programs import DECODE, PREFILL, ProgramName
from ..model import MegalodonCache
from ..model.cache import copy_in_place
from .base import Runtime, RuntimeUnavailable
from .onnx_session import OnnxSession, bind, open_session, require_cuda, shared_weights

_BOUND = 16  # decode steps kept bound (on CUDA: captured), each to the addresses of one cache


class OnnxRuntime(Runtime):
    """Runs `prefill.onnx` and `decode.onnx`."""

    capturable = False  # ONNX Runtime captures the graphs itself

    def __init__(self, folder: Path, manifest: Manifest, device: str | None = None, prepack: bool = False) -> None:
        """`prepack` (CPU): each session keeps a copy of the weights, arranged for its products.

        Without, both read the one file that is mapped. RuntimeUnavailable where a node would not run on the device.
        """
        entry = manifest.programs.onnx
        if entry is None:
            raise RuntimeUnavailable(f"{folder} has no ONNX programs; make them: megalodon-export onnx --add {folder}")
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if chosen.type == "cuda":
            require_cuda(chosen)
            chosen = torch.device("cuda", torch.cuda.current_device() if chosen.index is None else chosen.index)
        super().__init__(manifest.config, manifest.torch_dtype, chosen, entry.limits, entry.all_logits)
        self._entries = entry.graphs
        paths = {name: folder / one.file for name, one in self._entries.items()}
        weights = shared_weights(list(paths.values()), chosen) if chosen.type == "cuda" else {}
        self._sessions = {
            name: open_session(path, chosen, weights.get(path, {}), prepack, capture=name == DECODE)
            for name, path in paths.items()
        }
        self._steps: OrderedDict[tuple[int, ...], BoundStep] = OrderedDict()
        self._graphs = 0

    def run_prefill(self, token_ids: Tensor, lengths: Tensor, cache: MegalodonCache) -> Tensor:
        """One call of the prefill graph."""
        rows = token_ids.shape if self.all_logits else (cache.batch,)
        logits = torch.empty((*rows, self.config.logits_size), device=self.device)
        BoundStep(self, PREFILL, {"token_ids": token_ids, "lengths": lengths}, cache, logits).run(cache)
        return logits

    def run_decode(self, token_ids: Tensor, cache: MegalodonCache) -> Tensor:
        """One call of the decode graph; on CUDA the second for a cache replays what the first has captured."""
        key = cache.batch, *(tensor.data_ptr() for tensor in cache.tensors())
        step = self._steps.get(key)
        if step is None:
            step = self._steps[key] = self._captured_step(cache)
        self._steps.move_to_end(key)
        step.arguments["token_ids"].copy_(token_ids)
        step.run(cache)
        return step.logits.clone()

    def _captured_step(self, cache: MegalodonCache) -> BoundStep:
        if len(self._steps) == _BOUND:
            _, oldest = self._steps.popitem(last=False)
            self._sessions[DECODE].release(oldest.graph)
        token_ids = torch.zeros(cache.batch, dtype=torch.int64, device=self.device)
        logits = torch.empty(cache.batch, self.config.logits_size, device=self.device)
        self._graphs += 1
        return self.bound_step(cache, token_ids, logits, self._graphs)

    def bound_step(
        self, cache: MegalodonCache, token_ids: Tensor, logits: Tensor, graph: int | None = None
    ) -> BoundStep:
        """A decode step on these tensors; on CUDA captured under a number, if there is one."""
        return BoundStep(self, DECODE, {"token_ids": token_ids}, cache, logits, graph)


class BoundStep:
    """A graph bound to the addresses of arguments, of a cache, and of the buffers that its states leave in.

    It holds no reference to the cache: whoever runs it passes one that lies where that one lay.
    """

    def __init__(
        self,
        runtime: OnnxRuntime,
        program: ProgramName,
        arguments: dict[str, Tensor],
        cache: MegalodonCache,
        logits: Tensor,
        graph: int | None = None,
    ) -> None:
        self.arguments, self.logits, self.graph = arguments, logits, graph
        self.session: OnnxSession = runtime._sessions[program]
        self._states = [torch.empty_like(tensor) for tensor in cache.states()]
        past = dict(zip((name for name, *_ in runtime._layout), cache.tensors(), strict=True))
        small = {id(tensor): new for tensor, new in zip(cache.states(), self._states, strict=True)}
        present = {name: small.get(id(tensor), tensor) for name, tensor in past.items()}
        entry = runtime._entries[program]
        self.binding = bind(self.session, entry, arguments | past, {"logits": logits} | present)

    def run(self, cache: MegalodonCache) -> None:
        """Run it; the cache, at the addresses that were bound, is updated in place."""
        self.session.run(self.binding, self.graph)
        copy_in_place(cache.states(), self._states)
