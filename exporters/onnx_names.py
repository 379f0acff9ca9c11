"""Names of the inputs and outputs of the ONNX graphs, which the manifest lists. Reading it needs no ONNX package."""

from __future__ import annotations

from collections.abc import Callable

from .manifest_types import Graph, GraphTensor, Target
from .programs import DECODE, PREFILL, ProgramSpec, TensorSpec

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


def boundary(spec: ProgramSpec) -> Graph:
    """A graph's file, and its inputs and outputs in order, with the names that the rest of the manifest uses."""

    def entries(specs: tuple[TensorSpec, ...], name: Callable[[str], str]) -> tuple[GraphTensor, ...]:
        return tuple(GraphTensor(name(s.name), s.name, s.dims, s.dtype) for s in specs)

    outputs = entries(spec.outputs + spec.cache, present_name)
    return Graph(f"{spec.name}.onnx", entries(spec.inputs, past_name), outputs)
