"""Sessions of ONNX Runtime: each on one device alone, all over one copy of the weights, on tensors of torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import Tensor

from ..exporters.manifest_types import Graph
from ..model.cache import copy_in_place
from .base import RuntimeUnavailable

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
# 1.23 does not read opset 24, 1.24 has no TensorScatter, and 1.25 makes a FusedMatMul for which it has no kernel.
OLDEST = "1.26"
_MAX_NAMED = 10  # nodes in an error


class OnnxSession:
    """A graph on a device. On CUDA it can be captured in several CUDA graphs, which `run` tells apart by number."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        device: torch.device,
        weights: list[Any],
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        """`stream`: the CUDA stream that the session was given; None where ONNX Runtime has one of its own."""
        self.onnx, self.device, self._stream = session, device, stream
        self._weights = weights  # the session reads them and does not own them
        self._options: dict[int | None, onnxruntime.RunOptions] = {}

    def run(self, binding: onnxruntime.IOBinding, graph: int | None = None) -> None:
        """Run on bound tensors. `graph`: capture under this number, or replay what it names.

        It waits for the end, except on a CUDA stream that is known: torch's current one then waits for it.
        """
        if self.device.type != "cuda":
            return self.onnx.run_with_iobinding(binding, None)
        if graph not in self._options:
            self._options[graph] = self._run_options(graph)
        options = self._options[graph]
        current = torch.cuda.current_stream(self.device)
        if self._stream is None:
            current.synchronize()
            return self.onnx.run_with_iobinding(binding, options)
        self._stream.wait_stream(current)
        self.onnx.run_with_iobinding(binding, options)
        current.wait_stream(self._stream)

    def _run_options(self, graph: int | None) -> onnxruntime.RunOptions:
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(-1 if graph is None else graph))
        if self._stream is not None:
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options

    def release(self, graph: int | None) -> None:
        """Free the CUDA graph that was captured under a number."""
        if graph is not None and self.device.type == "cuda":
            self.onnx.release_captured_graph(graph)


def require_version() -> None:
    """RuntimeUnavailable if this ONNX Runtime is too old for the graphs."""
    found, oldest = ([int(part) for part in re.findall(r"\d+", text)[:2]] for text in (onnxruntime.__version__, OLDEST))
    if found < oldest:
        raise RuntimeUnavailable(
            f"the ONNX graphs need onnxruntime {OLDEST} or newer, found {onnxruntime.__version__}; "
            "install it: python -m pip install --upgrade onnxruntime-gpu (or onnxruntime, whichever is there)"
        )


def require_cuda(device: torch.device) -> None:
    """RuntimeUnavailable unless torch and ONNX Runtime both have CUDA."""
    if CUDA not in onnxruntime.get_available_providers() or not torch.cuda.is_available():
        raise RuntimeUnavailable(
            f"{device} needs an ONNX Runtime and a torch with CUDA, found onnxruntime {onnxruntime.__version__} with "
            f"{', '.join(onnxruntime.get_available_providers())} and torch {torch.__version__}; "
            "install onnxruntime-gpu and a CUDA build of torch, or use the CPU"
        )
    onnxruntime.preload_dlls()


def open_session(
    path: Path,
    device: torch.device,
    weights: dict[str, onnxruntime.OrtValue],
    prepack: bool,
    capture: bool,
    library: Path | None = None,
    stream: torch.cuda.Stream | None = None,
) -> OnnxSession:
    """Open a graph with every node on the device. `weights`, by their names in the graph, are used without a copy.

    `library` has the graph's custom operators. On CUDA the graph runs on `stream`, or on one of ONNX Runtime's own.
    RuntimeUnavailable if nodes would run elsewhere; the error names them.
    """
    options = _options(library)
    for name, value in weights.items():
        options.add_initializer(name, value)
    if device.type == "cpu":
        if not prepack:  # by default every session copies the weights into an order of its own
            options.add_session_config_entry("session.disable_prepacking", "1")
        return OnnxSession(_open(path, options, [CPU]), device, list(weights.values()))
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    cuda = {"device_id": str(device.index), "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
    if capture:  # not for prefill: it has nodes on the host, which compute with sizes, and cannot be captured
        cuda["enable_cuda_graph"] = "1"
    if stream is not None:
        cuda["user_compute_stream"] = str(stream.cuda_stream)
    try:
        session = _open(path, options, [(CUDA, cuda)])
    except Exception as error:  # ONNX Runtime's error classes have no public names
        elsewhere = "" if library else _elsewhere(path)
        raise RuntimeUnavailable(f"{path.name} does not run on CUDA alone: {error}{elsewhere}") from error
    return OnnxSession(session, device, list(weights.values()), stream)


def _options(library: Path | None = None) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    if library is not None:
        options.register_custom_ops_library(str(library))
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return options


def _open(path: Path, options: onnxruntime.SessionOptions, providers: list[Any]) -> onnxruntime.InferenceSession:
    # The export has folded constants. ONNX Runtime would only fold transposed weights, and copy them for that.
    return onnxruntime.InferenceSession(str(path), options, providers, disabled_optimizers=["ConstantFolding"])


def _elsewhere(path: Path) -> str:
    """The nodes that ONNX Runtime would not run on CUDA, as the end of an error's sentence; "" if there are none."""
    options = _options()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = _open(path, options, [CUDA, CPU])
    if CUDA not in session.get_providers():
        return "; its CUDA provider could not be loaded: see `megalodon-export doctor`"
    parts = session.get_provider_graph_assignment_info()
    nodes = [f"{node.name} ({node.op_type})" for part in parts if part.ep_name != CUDA for node in part.get_nodes()]
    more = f" and {len(nodes) - _MAX_NAMED} more" if len(nodes) > _MAX_NAMED else ""
    return f"; on the CPU would run {', '.join(nodes[:_MAX_NAMED])}{more}" if nodes else ""


def _external(path: Path) -> dict[str, ir.ExternalTensor]:
    values = ir.load(path).graph.initializers.values()
    return {v.name: v.const_value for v in values if isinstance(v.const_value, ir.ExternalTensor) and v.name}


def shared_weights(paths: list[Path], device: torch.device) -> dict[Path, dict[str, onnxruntime.OrtValue]]:
    """The weights of all graphs on a device, by their names in each graph. Graphs share what is one tensor on disk."""
    places: dict[Any, onnxruntime.OrtValue] = {}
    named: dict[Path, dict[str, onnxruntime.OrtValue]] = {}
    for path in paths:
        named[path] = {}
        for name, tensor in _external(path).items():
            place = str(tensor.path), tensor.offset
            if place not in places:
                places[place] = onnxruntime.OrtValue.from_dlpack(_as_torch(tensor).to(device))
            named[path][name] = places[place]
    return named


def _as_torch(tensor: ir.ExternalTensor) -> Tensor:
    dtype = next(d for d in _TORCH_DTYPES if from_torch_dtype(d) == tensor.dtype)
    return torch.frombuffer(bytearray(tensor.tobytes()), dtype=dtype).reshape(tensor.shape.numpy())


_TORCH_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool)


def bind(
    session: OnnxSession, entry: Graph, inputs: dict[str, Tensor], outputs: dict[str, Tensor]
) -> onnxruntime.IOBinding:
    """Bind tensors, by the manifest's names, to a graph's inputs and outputs.

    The binding holds addresses, so the caller keeps the tensors alive.
    """
    binding = session.onnx.io_binding()
    index = session.device.index or 0
    for one in entry.inputs:
        tensor = inputs[one.tensor]
        place = (session.device.type, index, int(from_torch_dtype(tensor.dtype)), tensor.shape, tensor.data_ptr())
        binding.bind_input(one.name, *place)
    for one in entry.outputs:
        tensor = outputs[one.tensor]
        place = (session.device.type, index, int(from_torch_dtype(tensor.dtype)), tensor.shape, tensor.data_ptr())
        binding.bind_output(one.name, *place)
    return binding


@dataclass
class BoundGraph:
    """A graph bound to the addresses of its inputs and outputs; `number`: on CUDA, that of the captured CUDA graph."""

    session: OnnxSession
    binding: onnxruntime.IOBinding
    number: int | None
    logits: Tensor
    states: list[Tensor]
    new_states: list[Tensor]

    def run(self) -> None:
        """Run it, and update the cache in place."""
        self.session.run(self.binding, self.number)
        copy_in_place(self.states, self.new_states)
