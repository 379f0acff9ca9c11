"""ONNX Runtime on a bundle's graphs: on a CPU, or on CUDA with every node there.

Keys and values are updated in place: one buffer is a graph's input and its output. The small states are written to
buffers of their own, and copied to the cache after the run. A decode step writes slot `position mod C` of each ring
before it reads it, so running it again from the same states gives the same values. ONNX Runtime needs that, because it
runs a graph several times where it captures a CUDA graph.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch  # before onnxruntime, which finds CUDA's libraries among those that torch has loaded
from torch import Tensor

from ..bundles.manifest import Manifest
from ..exporters.onnx_names import KERNEL_LIBRARY
from ..exporters.programs import DECODE, NEXT_TOKENS, PREFILL, ProgramName
from ..model import ModelCache
from ..model.modeling import last_valid
from .base import Runtime, RuntimeUnavailable, require_device
from .bound_programs import BoundPrograms
from .onnx_kernels import CapturedGraphs, captured_in_place, kernel_graphs, suit
from .onnx_session import BoundGraph, bind, open_session, require_cuda, require_version, shared_weights


class OnnxRuntime(Runtime):
    """Runs `prefill.onnx` and `decode.onnx`, or on CUDA the graphs with kernels, where the bundle has them."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        device: str | None = None,
        prepack: bool = False,
        kernels: bool | None = None,
    ) -> None:
        """`prepack` (CPU): each graph's session keeps a copy of the weights in an order that suits its matrix products.

        Without it, both sessions read the weights from one mapped file. `kernels`: whether to run the graphs with
        kernels (default: on a GPU for which they are, if they are there). RuntimeUnavailable if a node would not run
        on the device.
        """
        entry = manifest.programs.onnx
        if entry is None:
            raise RuntimeUnavailable(f"{folder} has no ONNX programs; make them: megalodon-export onnx --add {folder}")
        require_version()
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if chosen.type == "cuda":
            require_cuda(chosen)
            require_device(chosen)
            chosen = torch.device("cuda", torch.cuda.current_device() if chosen.index is None else chosen.index)
        config, dtype = manifest.config, manifest.torch_dtype
        super().__init__(config, dtype, chosen, entry.limits, entry.all_logits, manifest.model_id)
        self.kernels = suit(folder, manifest, chosen) if kernels is None else kernels
        self.entries = kernel_graphs(manifest) if self.kernels else entry.graphs
        paths = {name: folder / one.file for name, one in self.entries.items()}
        on_gpu = chosen.type == "cuda"
        weights = shared_weights(list(paths.values()), chosen) if on_gpu or self.kernels else {}
        library = folder / KERNEL_LIBRARY if self.kernels else None
        stream = torch.cuda.Stream(chosen) if on_gpu and self.kernels else None
        self.sessions = {
            name: open_session(
                path, chosen, weights.get(path, {}), prepack, name == DECODE or self.kernels, library, stream
            )
            for name, path in paths.items()
        }
        self.graph_numbers = itertools.count(1)  # each names one captured decode step

    def _bind(self, cache: ModelCache, capture: bool) -> BoundPrograms:
        return (BoundKernelGraphs if self.kernels else BoundOnnxPrograms)(self, cache, capture)


class BoundOnnxPrograms(BoundPrograms):
    """The graphs over one cache. On CUDA ONNX Runtime, not torch, captures the decode step."""

    runtime: OnnxRuntime

    def __init__(self, runtime: OnnxRuntime, cache: ModelCache, capture: bool) -> None:
        super().__init__(runtime, cache, capture=False)
        self._decode: BoundGraph | None = None
        self._token_ids = torch.zeros(cache.batch, dtype=torch.int64, device=runtime.device)
        self._graph = next(runtime.graph_numbers) if capture else None

    def run_prefill(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """Logits (B, V) of the last tokens."""
        if self.runtime.all_logits:
            return last_valid(self.run_score(token_ids, lengths), lengths)
        return self._run_prefill(token_ids, lengths, (self.cache.batch,))

    def run_score(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """Logits (B, L, V) of all tokens."""
        return self._run_prefill(token_ids, lengths, token_ids.shape)

    def _run_prefill(self, token_ids: Tensor, lengths: Tensor, rows: Sequence[int]) -> Tensor:
        graph = self.bind_graph(PREFILL, {"token_ids": token_ids, "lengths": lengths}, rows)
        graph.run()
        return graph.logits

    def run_decode(self, token_ids: Tensor) -> Tensor:
        """Logits (B, V). On CUDA the first call captures the graph, and the others replay it."""
        if self._decode is None:
            self._decode = self.bind_graph(DECODE, {"token_ids": self._token_ids}, (self.cache.batch,), self._graph)
            # The CUDA graph, if there is one, lives as long as this object.
            weakref.finalize(self, self._decode.session.release, self._graph).atexit = False
        self._token_ids.copy_(token_ids)
        self._decode.run()
        return self._decode.logits.clone()

    def bind_graph(
        self, program: ProgramName, arguments: dict[str, Tensor], rows: Sequence[int], number: int | None = None
    ) -> BoundGraph:
        """A program's graph bound to arguments, to the cache, and to buffers for logits (*rows, V) and small states."""
        size = (*rows, self.runtime.config.logits_size)
        logits = torch.empty(size, dtype=torch.float32, device=self.runtime.device)
        states = self.cache.states()
        new_states = [torch.empty_like(tensor) for tensor in states]
        past = self.runtime.named_tensors(self.cache)
        replaced = {id(tensor): new for tensor, new in zip(states, new_states, strict=True)}
        present = {name: replaced.get(id(tensor), tensor) for name, tensor in past.items()}
        session, entry = self.runtime.sessions[program], self.runtime.entries[program]
        binding = bind(session, entry, arguments | past, {"logits": logits} | present)
        return BoundGraph(session, binding, number, logits, states, new_states)


class BoundKernelGraphs(BoundOnnxPrograms):
    """The graphs with kernels over one cache. A decode step updates all of it in place, and chooses the next tokens."""

    def __init__(self, runtime: OnnxRuntime, cache: ModelCache, capture: bool) -> None:
        super().__init__(runtime, cache, capture)
        self._capture = capture
        self._captured_prefills = CapturedGraphs()
        self._next_tokens = torch.zeros(2, cache.batch, dtype=torch.int64, device=runtime.device)
        self._steps: dict[tuple[int, int], tuple[BoundGraph, Tensor, Tensor]] = {}  # by the addresses of both tensors

    def _run_prefill(self, token_ids: Tensor, lengths: Tensor, rows: Sequence[int]) -> Tensor:
        """The first call of a size runs uncaptured, the second is captured, and later ones replay it."""
        size, captured = tuple(token_ids.shape), self._captured_prefills
        if not (self._capture and captured.is_due(size)):
            return super()._run_prefill(token_ids, lengths, rows)
        if size not in captured.graphs:
            arguments = {"token_ids": torch.zeros_like(token_ids), "lengths": torch.zeros_like(lengths)}
            number = next(self.runtime.graph_numbers)
            graph = self.bind_graph(PREFILL, arguments, rows, number)
            weakref.finalize(graph, graph.session.release, number).atexit = False
            graph.session.run(graph.binding, number)  # several times, over rows without tokens, which keep their cache
            captured.add(size, graph, arguments)
        graph, arguments = captured.graphs[size]
        arguments["token_ids"].copy_(token_ids)
        arguments["lengths"].copy_(lengths)
        graph.run()
        return graph.logits.clone()

    def run_decode(self, token_ids: Tensor) -> Tensor:
        """Logits (B, V)."""
        self._token_ids.copy_(token_ids)
        return self._step(self._token_ids, self._next_tokens).logits.clone()

    def run_greedy(self, token_ids: Tensor, next_tokens: Tensor) -> None:
        """The graph itself writes `next_tokens`, and reads `token_ids` there if they are its first row."""
        if token_ids.data_ptr() != next_tokens.data_ptr():
            self._token_ids.copy_(token_ids)
            token_ids = self._token_ids
        self._step(token_ids, next_tokens)

    def _step(self, token_ids: Tensor, next_tokens: Tensor) -> BoundGraph:
        """One step on tensors whose addresses are captured at the first call with them."""
        key = token_ids.data_ptr(), next_tokens.data_ptr()
        if key not in self._steps:
            number = next(self.runtime.graph_numbers) if self._capture else None
            graph = self._bind_step(token_ids, next_tokens, number)
            weakref.finalize(self, graph.session.release, number).atexit = False
            self._steps[key] = graph, token_ids, next_tokens  # the binding does not keep tensors alive
            if number is not None:
                captured_in_place(graph.run, self.cache, [token_ids, next_tokens])
        graph, *_ = self._steps[key]
        graph.run()
        return graph

    def _bind_step(self, token_ids: Tensor, next_tokens: Tensor, number: int | None) -> BoundGraph:
        size = self.cache.batch, self.runtime.config.logits_size
        logits = torch.empty(size, dtype=torch.float32, device=self.runtime.device)
        cache = self.runtime.named_tensors(self.cache)
        session, entry = self.runtime.sessions[DECODE], self.runtime.entries[DECODE]
        outputs = {"logits": logits, NEXT_TOKENS: next_tokens} | cache
        binding = bind(session, entry, {"token_ids": token_ids} | cache, outputs)
        return BoundGraph(session, binding, number, logits, [], [])
