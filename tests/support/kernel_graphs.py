"""Graphs with kernels on ONNX Runtime's CPU provider, over a CUDA driver that is not one.

The operator library is built for the CPU provider and finds the driver of `fake_cuda.c`. Its launches arrive here, and
Triton's interpreter runs them on the tensors that ONNX Runtime holds. So everything is real but the machine code: the
graph, the library, grids, arguments and their order, and what is in place. Run it with TRITON_INTERPRET=1:

    python -m support.kernel_graphs FOLDER        compares prefill and decode with the plain model; prints differences
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from megalodon_export.runtimes.onnx_session import shared_weights

FAKE_DRIVER = "libcuda.so.1"
KERNELS = "kernels.json"  # of a test's folder: by name, each kernel's module, function, types and constants
CALLBACK = ctypes.CFUNCTYPE(
    *(None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_uint, ctypes.c_int),
    ctypes.POINTER(ctypes.c_void_p),
)
_NUMBERS: dict[str, Any] = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
_POINTERS = {
    **{"*fp32": torch.float32, "*bf16": torch.bfloat16, "*fp64": torch.float64, "*i64": torch.int64},
    **{"*i32": torch.int32, "*i8": torch.int8, "*u8": torch.uint8},
}


class FakeDriver:
    """The driver, and what was launched: (kernel, grid, threads, shared memory, PDL) each."""

    def __init__(self, folder: Path, interpret: bool) -> None:
        self.library = ctypes.CDLL(str(folder / FAKE_DRIVER), mode=os.RTLD_GLOBAL)
        self.kernels = json.loads((folder / KERNELS).read_text())
        self.launched: list[tuple[str, tuple[int, ...], int, int, bool]] = []
        self.error: Exception | None = None
        self._run: Callable[..., None] = self._interpret if interpret else lambda *launch: None
        self._callback = CALLBACK(self._launched)
        self.reset()

    def reset(self, gpu: int = 90, context: bool = True, launch_error: int = 0) -> None:
        """Be another GPU: 10 major + minor."""
        self.launched.clear()
        self.library.fake_reset(self._callback, gpu, int(context), launch_error)

    def _launched(self, name: bytes, grid: Any, threads: int, shared: int, pdl: int, arguments: Any) -> None:
        try:
            self.launched.append((name.decode(), tuple(grid[:3]), threads, shared, bool(pdl)))
            self._run(name.decode(), tuple(grid[:3]), arguments)
        except Exception as error:  # an exception cannot pass through C
            self.error = self.error or error

    def _interpret(self, name: str, grid: tuple[int, ...], arguments: Any) -> None:
        kernel = self.kernels[name]
        values = dict(kernel["constants"], PDL=False)
        places = iter(range(len(kernel["types"])))
        for parameter, kind in kernel["types"]:
            if kind == "constexpr":
                continue
            address = arguments[next(places)]
            if kind in _NUMBERS:
                values[parameter] = _NUMBERS[kind].from_address(address).value
            else:
                dtype, pointer = _POINTERS[kind], ctypes.c_void_p.from_address(address).value
                assert pointer is not None
                memory = (ctypes.c_char * dtype.itemsize).from_address(pointer)
                values[parameter] = torch.frombuffer(memory, dtype=dtype)
        function = getattr(import_module(kernel["module"]), kernel["function"])
        function[grid](**{parameter: values[parameter] for parameter, _ in kernel["types"]})


def open_graph(folder: Path, program: str) -> onnxruntime.InferenceSession:
    """A graph with kernels on the CPU provider."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.register_custom_ops_library(str(folder / "onnx_kernels.so"))
    path = folder / f"{program}_kernels.onnx"
    weights = shared_weights([path], torch.device("cpu"))[path]
    for name, value in weights.items():
        options.add_initializer(name, value)  # a mapped file's would not begin at multiples of 16 bytes
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    session.weights = weights  # the session reads them and does not own them
    return session


def run_graph(session: onnxruntime.InferenceSession, inputs: dict[str, Any], in_place: bool) -> dict[str, torch.Tensor]:
    """A graph's outputs by name; with `in_place`, every cache tensor's buffer is its own output."""
    binding = session.io_binding()
    outputs: dict[str, torch.Tensor] = {}
    for name, tensor in inputs.items():
        element = 16 if tensor.dtype == torch.bfloat16 else {torch.float32: 1, torch.int64: 7}[tensor.dtype]
        binding.bind_input(name, "cpu", 0, element, tuple(tensor.shape), tensor.data_ptr())
        present = name.replace("past_key_values", "present")
        if present != name:
            outputs[present] = tensor if in_place else torch.full_like(tensor, -7)
            binding.bind_output(present, "cpu", 0, element, tuple(tensor.shape), outputs[present].data_ptr())
    others = [one.name for one in session.get_outputs() if one.name not in outputs]
    for name in others:
        binding.bind_output(name, "cpu")
    session.run_with_iobinding(binding)
    values = binding.get_outputs()[len(outputs) :]  # in the order in which they were bound
    return outputs | {n: torch.from_numpy(v.numpy().copy()) for n, v in zip(others, values, strict=True)}


def main(folder: Path) -> None:
    """Print the largest differences of prefill and decode from the plain model."""
    from megalodon_export.exporters.onnx_names import past_name, present_name
    from megalodon_export.model import MegalodonForCausalLM, cache_layout
    from support import triton_interpreter  # noqa: F401 - before the kernels

    driver = FakeDriver(folder, interpret=True)
    model = MegalodonForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    names = [one.name for one in cache_layout(model.config)]
    sessions = {name: open_graph(folder, name) for name in ("prefill", "decode")}
    for batch in (1, 2, 5):
        for in_place in (True, False):
            torch.manual_seed(batch)
            cache, other = model.new_cache(batch), model.new_cache(batch)
            ids = torch.randint(model.config.vocab_size, (batch, 32))
            lengths = torch.tensor([32 - 7 * i for i in range(batch)])
            worst = {"logits": 0.0, "cache": 0.0, "tokens": 0.0}
            for step in range(4):
                prefill = step in (0, 2)
                arguments = {"input_ids": ids, "lengths": lengths} if prefill else {"input_ids": ids[:, step].clone()}
                past = {past_name(n): t for n, t in zip(names, other.tensors(), strict=True)}
                found = run_graph(
                    sessions["prefill" if prefill else "decode"], arguments | past, in_place and not prefill
                )
                if driver.error is not None:
                    raise driver.error
                with torch.no_grad():
                    logits = model.prefill(ids, lengths, cache) if prefill else model.decode(ids[:, step], cache)
                present = [found[present_name(n)] for n in names]
                other.replace(present)
                worst["logits"] = max(worst["logits"], float((found["logits"] - logits).abs().max()))
                pairs = zip(present, cache.tensors(), strict=True)
                worst["cache"] = max(worst["cache"], *(float((a - b).abs().max()) for a, b in pairs))
                if not prefill:
                    worst["tokens"] += float((found["next_tokens"][0] != logits.argmax(-1)).sum())
            for name, value in worst.items():
                print(f"batch {batch}, {'in place' if in_place else 'other buffers'}, {name} {value}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
