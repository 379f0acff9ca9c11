"""Checks of a graph that take no GPU: every node has a CUDA kernel, and caches may be updated in place.

    not_on_cuda(graph) -> ["DFT_12: DFT of opset 24 has no CUDA kernel for f32"]

`cuda_kernels.json` is a table of where ONNX Runtime ran every operation on a GPU machine, by opset and dtype.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir

KERNELS_DOMAIN = "megalodon"  # of nodes that launch kernels of ours
TABLE = Path(__file__).with_name("cuda_kernels.json")
_DTYPES = {
    **{ir.DataType.FLOAT: "f32", ir.DataType.FLOAT16: "f16", ir.DataType.BFLOAT16: "bf16", ir.DataType.DOUBLE: "f64"},
    **{ir.DataType.INT64: "i64", ir.DataType.INT32: "i32", ir.DataType.BOOL: "bool"},
}
# Operations whose kernel is chosen by the dtype of another input than the first, and inputs that are read on the host.
_DECIDES = {"Where": 1, "TensorScatter": 0}
_TAKES_SIZES = {"Slice": (1, 2, 3, 4), "Reshape": (1,), "Expand": (1,)}


class PlacementError(Exception):
    """A graph has nodes that ONNX Runtime would not run on CUDA, or caches that must not be updated in place."""


@cache
def kernels() -> dict[str, Any]:
    """The table: for every operation and opset, the dtypes by where they ran."""
    table: dict[str, Any] = json.loads(TABLE.read_text())["kernels"]
    return table


def not_on_cuda(graph: ir.Graph) -> list[str]:
    """Every node without a CUDA kernel in the table, or whose work is on sizes in host memory; empty if all is well."""
    found = []
    for node in graph:
        problem = _kernel_problem(node, graph.opset_imports) or _size_problem(node)
        if problem:
            found.append(f"{node.name}: {problem}")
    return found


def _kernel_problem(node: ir.Node, opsets: dict[str, int]) -> str | None:
    if node.domain == KERNELS_DOMAIN:
        return None  # the kernel's code is in the bundle
    if node.domain:
        return f"an operation of another domain, {node.domain}.{node.op_type}"
    name, opset = node.op_type, opsets[""]
    value = node.inputs[_DECIDES.get(name, 0)]
    assert value is not None
    dtype = _DTYPES.get(value.dtype) if value.dtype is not None else None
    if name == "Cast":
        name = f"Cast->{_DTYPES.get(ir.DataType(node.attributes['to'].as_int()))}"
    if name == "TensorScatter":
        name = f"TensorScatter-{node.attributes['mode'].as_string()}"
    versions = {int(version): entry for version, entry in kernels().get(name, {}).items()}
    around = (
        [versions[opset]] if opset in versions else [v for o, v in versions.items() if o in _around(versions, opset)]
    )
    if not around:
        return f"{name} of opset {opset} is not in the table of CUDA kernels"
    if any(dtype not in entry.get("CUDA", ()) for entry in around):
        return f"{name} of opset {opset} has no CUDA kernel for {dtype}"
    return None


def _around(versions: dict[int, Any], opset: int) -> list[int]:
    """The nearest opsets of the table below and above: a kernel that both have exists in between, too."""
    below, above = [v for v in versions if v < opset], [v for v in versions if v > opset]
    return [max(below), *([min(above)] if above else [])] if below else []


def _size_problem(node: ir.Node) -> str | None:
    for index, value in enumerate(node.inputs):
        producer = value.producer() if value is not None else None
        if producer is not None and producer.op_type == "Shape" and index not in _TAKES_SIZES.get(node.op_type, ()):
            return f"{node.op_type} computes with the sizes that {producer.name} reads, on the CPU"
    return None


def unsafe_in_place(graph: ir.Graph) -> list[str]:
    """Readers of a cache tensor that might run after the node that overwrites it; empty if there are none.

    ONNX Runtime does not know that the node's input and output are one buffer: only the order of the graph protects
    what is read from the old one, so every reader must be something that the node waits for.
    """
    found = []
    for writer, old, new in _written_in_place(graph):
        if not old.is_graph_input() or not new.is_graph_output():
            found.append(f"{writer.name} does not take the graph's to the graph's own tensor")
        waits_for = _before(writer)
        late = [user.name for user, _ in old.uses() if user is not writer and user not in waits_for]
        found += [f"{name} may read {old.name} after {writer.name} has written to it" for name in late]
    return found


def _written_in_place(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Value, ir.Value]]:
    """Nodes whose output may be the buffer of an input, with both values."""
    for node in graph:
        if node.op_type == "TensorScatter":
            pairs = [(0, 0)]
        elif node.domain == KERNELS_DOMAIN:
            outputs = [
                line.split() for line in node.attributes["program"].as_string().splitlines() if line[:6] == "output"
            ]
            pairs = [(int(words[-1]), i) for i, words in enumerate(outputs) if words[-2] == "="]
        else:
            continue
        for old, new in pairs:
            value = node.inputs[old]
            assert value is not None
            yield node, value, node.outputs[new]


def _before(node: ir.Node) -> set[ir.Node]:
    """All nodes that a node waits for."""
    found: set[ir.Node] = set()
    waiting = [node]
    while waiting:
        for value in waiting.pop().inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and producer not in found:
                found.add(producer)
                waiting.append(producer)
    return found


def require(graph: ir.Graph) -> None:
    """PlacementError, naming the nodes, unless the graph runs on CUDA alone and updates its caches in place."""
    problems = not_on_cuda(graph) + unsafe_in_place(graph)
    if problems:
        raise PlacementError(f"{graph.name} cannot run on CUDA alone, caches in place: " + "; ".join(problems))
