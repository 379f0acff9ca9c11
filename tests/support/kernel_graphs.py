"""Graphs with kernels on ONNX Runtime's CPU provider, over a CUDA driver that is not one.

The operator library is built for the CPU provider, and finds the driver of `fake_cuda.c`. Its launches arrive here,
where Triton's interpreter may run them on the tensors that ONNX Runtime holds. So everything is real but the machine
code: the graph, the library, grids, arguments and their order, and what is in place.

    python -m support.kernel_graphs compare FOLDER prefill,decode BATCH ...   calls against the plain model
    python -m support.kernel_graphs example FOLDER examples/onnx_cuda.py    the tokens that it writes
    python -m support.kernel_graphs launch FOLDER     what is launched, and what is refused, as JSON

`compare` and `example` need TRITON_INTERPRET=1. All run in processes of their own: a process has one CUDA driver.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from megalodon_export.exporters.onnx_names import KERNEL_LIBRARY, past_name, present_name
from megalodon_export.model import MegalodonForCausalLM, ModelCache, cache_layout
from megalodon_export.runtimes.onnx_session import shared_weights

FAKE_DRIVER, KERNELS = "libcuda.so.1", "kernels.json"  # KERNELS: each kernel's module, function, types and constants
ON_THE_CPU = ('-DMEGALODON_PROVIDER="CPUExecutionProvider"',)
CALLBACK = ctypes.CFUNCTYPE(
    *(None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_uint, ctypes.c_int),
    ctypes.POINTER(ctypes.c_void_p),
)
_NUMBERS: dict[str, Any] = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
_POINTERS = {
    **{"*fp32": torch.float32, "*bf16": torch.bfloat16, "*fp64": torch.float64, "*i64": torch.int64},
    **{"*i32": torch.int32, "*i8": torch.int8, "*u8": torch.uint8},
}
_ELEMENTS = {torch.float32: 1, torch.int32: 6, torch.int64: 7, torch.float64: 11}
Session = onnxruntime.InferenceSession
Tensors = dict[str, torch.Tensor]


def fake_code(kernels: dict[str, Any]) -> Callable[..., list[Any]]:
    """In the place of `compile_kernels`: code that names itself, and the kernels by name."""
    from megalodon_export.exporters.onnx_kernels.machine_code import PTX, Code

    def compile_kernels(found: Any, architectures: Sequence[str], report: Any) -> list[Any]:
        kernels.update({kernel.name: kernel for kernel in found})
        return [
            Code(k.name, "f", arch, f"{k.name}@{arch}\0".encode(), 50_000, 32 * dict(k.options)["num_warps"], 2, pdl)
            for k in kernels.values()
            for arch, pdl in [*((a, int(a[3:]) >= 90) for a in architectures), (PTX, False)]
        ]

    return compile_kernels


def write_driver(folder: Path, kernels: dict[str, Any]) -> None:
    """Build the fake driver in a folder, and describe the kernels beside it."""
    described = {
        name: {
            **{"module": kernel.function.fn.__module__, "function": kernel.function.__name__},
            **{"types": kernel.types, "constants": dict(kernel.constants)},
        }
        for name, kernel in kernels.items()
    }
    (folder / KERNELS).write_text(json.dumps(described))
    source = Path(__file__).with_name("fake_cuda.c")
    flags = "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-Wl,-soname,{FAKE_DRIVER}"
    subprocess.run(["cc", *flags, "-o", str(folder / FAKE_DRIVER), str(source)], check=True)


class FakeDriver:
    """The driver, and what was launched: (kernel, architecture, grid, threads, PDL) each."""

    def __init__(self, folder: Path, interpret: bool) -> None:
        self.library = ctypes.CDLL(str(folder / FAKE_DRIVER), mode=os.RTLD_GLOBAL)
        self.kernels = json.loads((folder / KERNELS).read_text())
        self.launched: list[tuple[str, str, tuple[int, ...], int, bool]] = []
        self.error: Exception | None = None
        self._run: Callable[..., None] = self._interpret if interpret else lambda *launch: None
        self._callback = CALLBACK(self._launched)
        self.reset()

    def reset(self, gpu: int = 90, context: bool = True, launch_error: int = 0) -> None:
        """Be another GPU: 10 major + minor."""
        self.launched.clear()
        self.library.fake_reset(self._callback, gpu, int(context), launch_error)

    def copies(self) -> int:
        """Copies on the device since `reset`."""
        return int(self.library.fake_copies())

    def _launched(self, image: bytes, grid: Any, threads: int, shared: int, pdl: int, arguments: Any) -> None:
        try:
            assert shared == 50_000
            name, architecture = image.decode().split("@")
            self.launched.append((name, architecture, tuple(grid[:3]), threads, bool(pdl)))
            self._run(name, tuple(grid[:3]), arguments)
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
                pointer = ctypes.c_void_p.from_address(address).value
                assert pointer is not None
                memory = (ctypes.c_char * _POINTERS[kind].itemsize).from_address(pointer)
                values[parameter] = torch.frombuffer(memory, dtype=_POINTERS[kind])
        assert ctypes.c_void_p.from_address(arguments[next(places)]).value is None  # Triton's own pointers
        function = getattr(import_module(kernel["module"]), kernel["function"])
        function[grid](**{parameter: values[parameter] for parameter, _ in kernel["types"]})


def open_graph(folder: Path, program: str) -> onnxruntime.InferenceSession:
    """A graph with kernels on the CPU provider."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(folder / KERNEL_LIBRARY))
    path = folder / f"{program}_kernels.onnx"
    weights = shared_weights([path], torch.device("cpu"))[path]
    for name, value in weights.items():
        options.add_initializer(name, value)  # a mapped file's would not begin at multiples of 16 bytes
    session = Session(str(path), options, ["CPUExecutionProvider"])
    session.weights = weights  # the session reads them and does not own them
    return session


def run_graph(session: onnxruntime.InferenceSession, inputs: Tensors, in_place: bool) -> Tensors:
    """A graph's outputs by name; with `in_place`, every cache tensor's buffer is its own output."""
    binding, outputs = session.io_binding(), dict[str, torch.Tensor]()
    for name, tensor in inputs.items():
        element = _ELEMENTS[tensor.dtype]
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
    return outputs | {name: torch.from_numpy(v.numpy().copy()) for name, v in zip(others, values, strict=True)}


def plain_model(folder: Path) -> MegalodonForCausalLM:
    """The model of a folder."""
    model = MegalodonForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def past(model: MegalodonForCausalLM, cache: ModelCache) -> Tensors:
    """A cache by the names of a graph's inputs."""
    return {past_name(t.name): tensor for t, tensor in zip(cache_layout(model.config), cache.tensors(), strict=True)}


def compare(folder: Path, programs: Sequence[str], batches: Sequence[int]) -> None:
    """Print the largest differences from the plain model, call by call, over one cache.

    Decode steps take turns: one in place, one with outputs in other buffers.
    """
    from support import triton_interpreter  # noqa: F401 - before the kernels

    compare_operations()
    driver, model = FakeDriver(folder, interpret=True), plain_model(folder)
    names = [present_name(one.name) for one in cache_layout(model.config)]
    sessions = {name: open_graph(folder, name) for name in sorted({*programs})}
    for batch in batches:
        torch.manual_seed(batch)
        cache, other = model.new_cache(batch), model.new_cache(batch)
        ids = torch.randint(model.config.vocab_size, (batch, 32))
        lengths = torch.tensor([32 - 7 * i for i in range(batch)])
        for call, program in enumerate(programs):
            prefill = program == "prefill"
            arguments = {"input_ids": ids, "lengths": lengths} if prefill else {"input_ids": ids[:, call].clone()}
            found = run_graph(sessions[program], arguments | past(model, other), not prefill and call % 2 == 1)
            if driver.error is not None:
                raise driver.error
            logits = model.prefill(ids, lengths, cache) if prefill else model.decode(ids[:, call], cache)
            other.replace([found[name] for name in names])
            worst = float((found["logits"] - logits).abs().max())
            for a, b in zip(other.tensors(), cache.tensors(), strict=True):
                worst = max(worst, float((a - b).abs().max()))
            if not prefill:
                worst += float((found["next_tokens"] - torch.stack([logits.argmax(-1), ids[:, 0] * 0])).abs().max())
            print(f"{batch} {program} {worst}", flush=True)


def compare_operations() -> None:
    """Print the largest difference of each operation of `exporters/onnx_kernels` from its reference."""
    from megalodon_export.exporters.onnx_kernels.last_tokens import take_tokens, take_tokens_reference
    from megalodon_export.exporters.onnx_kernels.pointwise import pointwise, pointwise_reference

    worst = 0.0
    for flags in itertools.product((False, True), repeat=5):
        sizes = (2, 3, 20), (20,), (2, 3, 20), (20,), (2, 3, 20)
        product, *terms = (torch.randn(size) for size in sizes)
        given = [term if flag else None for term, flag in zip(terms, flags[1:], strict=True)]
        difference = pointwise(product, *given, flags[0]) - pointwise_reference(product, *given, flags[0])
        worst = max(worst, float(difference.abs().max()))
    print(f"pointwise {worst}")
    x, index = torch.randn(3, 5, 2050), torch.tensor([4, 0, 2])
    print(f"take_tokens {float((take_tokens(x, index) - take_tokens_reference(x, index)).abs().max())}")


class Cases:
    """Runs graphs without computing anything, and keeps what was launched, or the error."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.driver, self.model = folder, FakeDriver(folder, interpret=False), plain_model(folder)
        self.found: dict[str, Any] = {}

    def run(
        self,
        name: str,
        batch: int = 1,
        program: str = "decode",
        in_place: bool = True,
        inputs: Tensors | None = None,
        folder: Path | None = None,
        **driver: Any,
    ) -> None:
        """One case; `inputs` replace those that fit."""
        self.driver.reset(**driver)
        prefill = program == "prefill"
        given = {"input_ids": torch.zeros((batch, 64) if prefill else (batch,), dtype=torch.int64)}
        given |= {"lengths": torch.full((batch,), 50)} if prefill else {}
        given |= past(self.model, self.model.new_cache(batch)) | (inputs or {})
        try:
            run_graph(open_graph(folder or self.folder, program), given, in_place)
            self.found[name] = {"launched": list(self.driver.launched), "copies": self.driver.copies()}
        except Exception as error:  # ONNX Runtime's error classes have no public names
            self.found[name] = {"error": str(error)}


def launch(folder: Path) -> None:
    """Print what is launched in every case that the tests look at, and the errors of those that are refused."""
    cases = Cases(folder)
    for batch in (1, 2, 4, 5, 64):
        cases.run(f"decode {batch}", batch)
        cases.run(f"prefill {batch}", batch, "prefill", in_place=False)
    cases.run("other buffers", in_place=False)
    cases.run("launch fails", launch_error=719)
    cases.run("two batches", inputs={"past_key_values.final.position": torch.zeros(2, dtype=torch.int64)})
    groups = cases.model.config.norm_num_groups
    cases.run("misaligned", inputs={"past_key_values.final.norm_mean": torch.zeros(groups + 1)[1:][None]})
    for gpu in (75, 80, 89, 90, 100, 121):
        cases.run(f"sm_{gpu}", gpu=gpu)
    cases.run("no context", context=False)
    for damaged in sorted(folder.glob("damaged-*")):
        cases.run(damaged.name, folder=damaged)
    print(json.dumps(cases.found))


def example(folder: Path, script: Path) -> None:
    """Run `examples/onnx_cuda.py` on the CPU: its tokens, with a prompt of the tokens 1, 2 and 3."""
    from support import triton_interpreter  # noqa: F401 - before the kernels

    driver = FakeDriver(folder, interpret=True)
    program = script.read_text().replace(") -> onnxruntime.InferenceSession", ")")
    for old, new in (
        ('"cuda", "CUDAExecutionProvider"', '"cpu", "CPUExecutionProvider"'),
        ("np.frombuffer(prompt.encode(), np.uint8)", "np.array([1, 2, 3])"),
        ("range(200)", "range(3)"),
        ("sys.stdout.buffer.write(bytes([token]))", "print(token)"),
    ):
        assert program.count(old) == 1, old
        program = program.replace(old, new)

    def opened(path: Path, options: Any, providers: list[str]) -> onnxruntime.InferenceSession:
        return open_graph(folder, path.stem.removesuffix("_kernels"))

    onnxruntime.InferenceSession, onnxruntime.preload_dlls = opened, lambda: None
    sys.argv = [str(script), str(folder), ""]
    exec(compile(program, str(script), "exec"), {"__name__": "example"})
    if driver.error is not None:
        raise driver.error


def main(words: Sequence[str]) -> None:
    """One of the functions above."""
    name, folder, *rest = words
    if name == "example":
        return example(Path(folder), Path(rest[0]))
    if name == "compare":
        return compare(Path(folder), rest[0].split(","), list(map(int, rest[1:])))
    launch(Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
