"""Names of the inputs and outputs of the ONNX graphs, which the manifest lists. Reading it needs no ONNX package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from msgspec import structs

from .manifest_types import Graph, GraphTensor, Target
from .programs import DECODE, NEXT_TOKENS, PREFILL, ProgramSpec, TensorSpec

GPU_ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")  # that kernels are compiled for
KERNELS_FILE, KERNEL_LIBRARY = "onnx_kernels.bin", "onnx_kernels.so"
CONSTANTS = "onnx_constants.safetensors"
TARGET = Target("cpu or cuda", "any")


def past_name(name: str) -> str:
    """The graphs' name of an input: as optimum and onnxruntime-genai name it, derived from the cache's."""
    return "input_ids" if name == "token_ids" else f"past_key_values.{_short(name)}" if "." in name else name


def present_name(name: str) -> str:
    """The graphs' name of an output."""
    return f"present.{_short(name)}" if "." in name else name


def _short(name: str) -> str:
    return name.removeprefix("layers.")


def graph_files() -> tuple[str, ...]:
    """Every file that the graphs need but the bundle's weights."""
    return (*(f"{name}.onnx" for name in (PREFILL, DECODE)), CONSTANTS)


def kernel_graph_file(name: str) -> str:
    """The file of a graph with kernels."""
    return f"{name}_kernels.onnx"


def kernel_files() -> tuple[str, ...]:
    """Every file that the graphs with kernels need but the bundle's weights."""
    return (*map(kernel_graph_file, (PREFILL, DECODE)), KERNELS_FILE, KERNEL_LIBRARY)


def with_next_tokens(spec: ProgramSpec) -> ProgramSpec:
    """A program as its graph with kernels has it: decode returns the most probable tokens, too."""
    if spec.name != DECODE:
        return spec
    return replace(spec, outputs=(*spec.outputs, TensorSpec(NEXT_TOKENS, ("2", "B"), "int64")))


def kernel_boundary(spec: ProgramSpec) -> Graph:
    """`boundary` of a graph with kernels."""
    return structs.replace(boundary(with_next_tokens(spec)), file=kernel_graph_file(spec.name))


def boundary(spec: ProgramSpec) -> Graph:
    """A graph's file, and its inputs and outputs in order, with the names that the rest of the manifest uses."""

    def entries(specs: tuple[TensorSpec, ...], name: Callable[[str], str]) -> tuple[GraphTensor, ...]:
        return tuple(GraphTensor(name(s.name), s.name, s.dims, s.dtype) for s in specs)

    outputs = entries(spec.outputs + spec.cache, present_name)
    return Graph(f"{spec.name}.onnx", entries(spec.inputs, past_name), outputs)
