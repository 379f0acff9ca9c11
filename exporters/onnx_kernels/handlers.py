"""Operations of `model/kernels` in a traced stage: each becomes one node, megalodon.Launch.

Importing this module registers a handler for each of them, and needs Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import sympy
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import fx

from ...model.kernels import backend  # noqa: F401 - defines the operators
from ..onnx.graph_builder import BATCH, MULTIPLES, Blank, Val
from ..onnx.translator import Translator, handles
from ..programs import DECODE
from ..torch_internals import operators
from . import last_tokens, pointwise  # noqa: F401 - define operators
from .operation import OperationText
from .recording import Kernel, Launch, record, with_case

DOMAIN, OPERATOR = "megalodon", "Launch"
KERNELS = "kernels"  # key of a graph's `shared`


def recorded_kernels(t: Any) -> dict[str, Kernel]:
    """The kernels that a graph's nodes launch, by name; `t` is the graph's builder."""
    kernels: dict[str, Kernel] = t.shared(KERNELS, dict)
    return kernels


def _launch(t: Translator, node: fx.Node, *args: Any) -> Any:
    fakes: Any = fx.node.map_arg(node.args, lambda n: n.meta["val"])

    def size(traced: Any) -> sympy.Expr:
        return sympy.sympify(t.size(traced))

    operation = record(node.target, fakes, size)
    if t.stage.name.startswith(DECODE):
        one_row = record(node.target, fakes, lambda traced: size(traced).subs(BATCH, 1))
        operation = with_case(operation, one_row, BATCH)
    nodes: dict[int, fx.Node] = {}
    operands: dict[int, Any] = {}
    for source, fake, operand in zip(node.args, fakes, args, strict=True):
        if isinstance(source, fx.Node):
            place = operation.place(fake)
            nodes[place], operands[place] = source, operand
    blank = [place for place, operand in operands.items() if isinstance(operand, Blank)]
    text = OperationText(operation, blank, t.size, {MULTIPLES: t.graph.length_multiple})
    recorded_kernels(t.graph).update({s.kernel.name: s.kernel for s in operation.steps if isinstance(s, Launch)})
    outputs = _outputs(t, text)
    inputs = [t.graph.value(operands[place]) for place in text.inputs]
    # A run's first kernel: the one before it may be of an earlier run, and later kernels read what that has written
    # before they wait for their own predecessor.
    barrier = all(value.producer() is None for value in inputs)
    attributes = {"operation": operation.name, "program": text.program(barrier)}
    t.graph.add(ir.node(OPERATOR, inputs, attributes, domain=DOMAIN, outputs=[val.value for val in outputs]))
    made = dict(zip(text.outputs, outputs, strict=True))
    for place in operation.written:
        t.env[nodes[place]] = made[place]
    results = tuple(made[place] for place in operation.results)
    return results[0] if isinstance(node.meta.get("val"), torch.Tensor) else results


def _outputs(t: Translator, text: OperationText) -> Sequence[Val]:
    vals = []
    for place in text.outputs:
        tensor = text.operation.tensors[place]
        dtype = from_torch_dtype(tensor.dtype)
        value = ir.Value(name=t.graph.new_name(OPERATOR), type=ir.TensorType(dtype))
        vals.append(Val.of(value, text.shape(tensor)))
    return vals


handles(*operators(DOMAIN))(_launch)
