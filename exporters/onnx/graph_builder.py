"""An ONNX graph under construction: nodes, constants, and values with symbolic sizes.

    x = graph.input("x", (BATCH, sympy.Integer(4)), torch.float32)      # Val with groups ((B,), (4,))
    y = graph.op("Exp", x.value)                                        # an onnx_ir.Value, of x's dtype

ONNX Runtime computes with sizes on the CPU, so a graph that does cannot run on CUDA alone. No node made here does:
a Reshape has a constant target (0 keeps a dimension, one may be -1), and a Shape node reads a dynamic size from a
tensor. Two dynamic dimensions are joined in `Val.groups` alone, since the next operation usually splits them again:

    (B, L, 8).flatten(0, 1)   value (B, L, 8), groups ((B, L), (8,)), shape (B L, 8)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import onnx_ir as ir
import sympy
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from torch import Tensor

OPSET = 24
# L is length_multiple * MULTIPLES. DATA_SIZE: a size that the graph reads from a tensor's values.
BATCH, MULTIPLES, DATA_SIZE = sympy.symbols("B multiples found", positive=True, integer=True)
Expr: TypeAlias = sympy.Expr
Dims: TypeAlias = tuple[Expr, ...]


class Computed:
    """Something that depends on the graph's inputs, so that it is not known at export."""


@dataclass(frozen=True, eq=False)
class Val(Computed):
    """A tensor of the traced program. Each of its dimensions is the product of a group of the ONNX value's."""

    value: ir.Value
    groups: tuple[Dims, ...]

    @classmethod
    def of(cls, value: ir.Value, dims: Sequence[Expr]) -> Val:
        """A Val with the dimensions of its ONNX value."""
        return cls(value, tuple((dim,) for dim in dims))

    @property
    def dims(self) -> Dims:
        """The dimensions of the ONNX value."""
        return tuple(dim for group in self.groups for dim in group)

    @property
    def shape(self) -> Dims:
        """The dimensions of the tensor in the traced program."""
        return tuple(sympy.prod(group) for group in self.groups)


@dataclass(frozen=True, eq=False)
class Const:
    """A tensor known at export: a weight of the checkpoint, which has a name, or one computed from weights."""

    tensor: Tensor
    name: str | None = None

    @property
    def shape(self) -> Dims:
        """Its sizes."""
        return tuple(sympy.Integer(size) for size in self.tensor.shape)


@dataclass(frozen=True)
class Arange(Computed):
    """torch.arange(start, stop), for which the graph has no nodes yet."""

    start: Expr
    stop: Expr
    dtype: torch.dtype = torch.int64

    @property
    def shape(self) -> Dims:
        """How many there are."""
        return (sympy.expand(self.stop - self.start),)


@dataclass(frozen=True, eq=False)
class Blank(Computed):
    """A tensor without contents, which a node writes whole: an output of the graph that the traced program takes."""

    shape: Dims


Operand: TypeAlias = Val | Const | Arange


class GraphBuilder:
    """Nodes, initializers and sizes of one graph. `weight` gives the external tensor of a named constant."""

    def __init__(
        self,
        length_multiple: int,
        largest: dict[Any, int],
        weight: Callable[[str], ir.ExternalTensor],
        shared: dict[Any, Any] | None = None,
    ) -> None:
        """`largest` values of the symbols. `shared`: a dict of the caller's, in which to keep what nodes share."""
        self.length = length_multiple * MULTIPLES  # L
        self.nodes: list[ir.Node] = []
        self.inputs: dict[str, ir.Value] = {}
        self.initializers: dict[str, ir.Value] = {}
        self.length_multiple, self._largest, self._weight = length_multiple, largest, weight
        self._constants: dict[Any, ir.Value] = {}
        self._made: dict[Const | Arange, ir.Value] = {}
        self._kept: list[Const] = []  # a Const is known by its identity, so it must not go
        self._sources: dict[Expr, tuple[ir.Value, int]] = {}
        self._shared: dict[Any, Any] = {} if shared is None else shared
        self._added = 0

    # ---- nodes and values

    def op(
        self, kind: str, *inputs: ir.Value, dtype: torch.dtype | None = None, count: int = 1, **attributes: Any
    ) -> Any:
        """Add a node; its output (a tuple if `count` > 1) has the given dtype, or the first input's."""
        of = from_torch_dtype(dtype) if dtype is not None else inputs[0].dtype
        assert of is not None
        outputs = [ir.Value(name=f"{kind.lower()}_{len(self.nodes)}_{i}", type=ir.TensorType(of)) for i in range(count)]
        node = ir.node(kind, inputs, attributes, outputs=outputs, name=f"{kind}_{len(self.nodes)}")
        self.nodes.append(node)
        return outputs[0] if count == 1 else tuple(outputs)

    def add(self, node: ir.Node) -> None:
        """Add a node of another domain, with outputs of its own."""
        node.name = f"{node.op_type}_{len(self.nodes)}"
        self.nodes.append(node)

    def new_name(self, kind: str) -> str:
        """A name for an output of a node that `add` takes."""
        self._added += 1
        return f"{kind.lower()}_output_{self._added}"

    def input(self, name: str, dims: Sequence[Expr], dtype: torch.dtype) -> Val:
        """Add an input of the graph; sizes found nowhere else are taken from it."""
        value = ir.Value(name=name, type=ir.TensorType(from_torch_dtype(dtype)), shape=self.named_shape(dims))
        self.inputs[name] = value
        for axis, dim in enumerate(dims):
            if dim.free_symbols:
                self._sources.setdefault(dim, (value, axis))
        return Val.of(value, dims)

    def named_shape(self, dims: Sequence[Expr]) -> ir.Shape:
        """Sizes as a user reads them: numbers, B, L."""
        names = {BATCH: "B", self.length: "L"}
        return ir.Shape([int(dim) if dim.is_number else names[dim] for dim in dims])

    def constant(self, value: Any, dtype: torch.dtype = torch.int64) -> ir.Value:
        """A small constant (a number or nested lists); equal ones are one initializer."""
        key = repr(value), dtype
        if key not in self._constants:
            self._constants[key] = self._initializer(torch.tensor(value, dtype=dtype))
        return self._constants[key]

    def shared(self, key: Any, make: Callable[[], Any]) -> Any:
        """The result of `make`, usually a value, made once for each key."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def value(self, operand: Operand) -> ir.Value:
        """The operand as an ONNX value of its own dimensions."""
        if isinstance(operand, Val):
            return self.reshape(operand, operand.shape).value
        if operand not in self._made:
            self._made[operand] = self._make(operand)
        return self._made[operand]

    def val(self, operand: Operand) -> Val:
        """The operand as a value of the graph, joined dimensions left as they are."""
        return operand if isinstance(operand, Val) else Val.of(self.value(operand), operand.shape)

    def _make(self, operand: Const | Arange) -> ir.Value:
        if isinstance(operand, Arange):
            return self._arange(operand)
        self._kept.append(operand)
        if operand.name is not None:
            external = self._weight(operand.name)
            value = ir.Value(
                name=operand.name, type=ir.TensorType(external.dtype), shape=external.shape, const_value=external
            )
            return self.initializers.setdefault(operand.name, value)
        return self._initializer(operand.tensor)

    def _initializer(self, tensor: Tensor) -> ir.Value:
        name = f"constant_{len(self.initializers)}"
        kept = TorchTensor(tensor.contiguous(), name=name)
        value = ir.Value(name=name, type=ir.TensorType(kept.dtype), shape=kept.shape, const_value=kept)
        self.initializers[name] = value
        return value

    # ---- shapes

    def reshape(self, x: Val, dims: Sequence[Expr], groups: tuple[Dims, ...] | None = None) -> Val:
        """x with other dimensions, by a constant target. ValueError if the target would need two dynamic sizes."""
        own, dims = x.dims, tuple(dims)
        result = groups or tuple((dim,) for dim in dims)
        if own == dims:
            return Val(x.value, result)
        target = []
        for axis, dim in enumerate(dims):
            kept = axis < len(own) and own[axis] == dim
            target.append(int(dim) if dim.is_number else 0 if kept else -1)
        if target.count(-1) > 1:
            raise ValueError(
                f"no constant target for a Reshape of {own} to {dims}: two sizes would have to be computed"
            )
        return Val(self.op("Reshape", x.value, self.constant(target)), result)

    def size(self, dim: Expr) -> ir.Value:
        """A dynamic size as an int64 tensor of one element, in host memory: for the ends of a Slice, nothing else."""
        if dim not in self._sources:
            self._sources[dim] = self._source(dim)
        value, axis = self._sources[dim]
        return self.op("Shape", value, dtype=torch.int64, start=axis, end=axis + 1)

    def add_data_size(self, number: ir.Value, largest: int) -> None:
        """Make DATA_SIZE the value of an integer scalar that the graph computes."""
        self._largest[DATA_SIZE] = largest
        count = self.op("Cast", number, dtype=torch.int64, to=int(ir.DataType.INT64))
        self._sources[DATA_SIZE] = self._first(DATA_SIZE, self.op("Reshape", count, self.constant([1]))), 0

    def _first(self, dim: Expr, count: ir.Value) -> ir.Value:
        """The integers 0 up to a count (of the size `dim`), as a slice of a constant table.

        At least two entries: ONNX Runtime merges a one-element table with the constant of the axis, which lies in host
        memory, where CUDA's Slice would then read the table.
        """
        table = self.value(Const(torch.arange(max(self.largest(dim), 2))))
        return self.op("Slice", table, self.constant([0]), count, self.constant([0]))

    def _source(self, dim: Expr) -> tuple[ir.Value, int]:
        """A tensor that has a dimension of a size, and its axis: an input reshaped, or joined vectors."""
        terms = dim.as_coefficients_dict()
        factor = terms.get(MULTIPLES, 0)
        if set(terms) == {MULTIPLES} and self.length_multiple % factor == 0:
            value, axis = self._sources[self.length]
            assert axis == 1
            return self.op("Reshape", value, self.constant([0, -1, self.length_multiple // int(factor)])), 1
        parts: list[ir.Value] = []
        for symbol, count in terms.items():
            if not (count.is_Integer and count > 0):
                raise ValueError(f"no tensor of the graph has a dimension of {dim}")
            if symbol == 1:
                parts.append(self.value(Const(torch.arange(int(count)))))
                continue
            step = max(d for d in range(1, int(count) + 1) if count % d == 0 and self.length_multiple % d == 0)
            unit = step * symbol if symbol == MULTIPLES else symbol
            parts += [self._first(unit, self.size(unit))] * (int(count) // (step if symbol == MULTIPLES else 1))
        return self.op("Concat", *parts, axis=0), 0

    def largest(self, dim: Expr) -> int:
        """The largest value of a size within the limits."""
        return int(dim.subs(self._largest))

    def _arange(self, steps: Arange) -> ir.Value:
        (size,) = steps.shape
        result = self._first(size, self.size(size))
        if steps.start != 0:
            result = self.op("Add", result, self.constant(int(steps.start)))
        if steps.dtype != torch.int64:
            result = self.op("Cast", result, dtype=steps.dtype, to=int(from_torch_dtype(steps.dtype)))
        return result

    def number(self, expression: Expr) -> ir.Value:
        """A dynamic size as an int64 scalar on the device: the last entry of arange(1, size + 1)."""
        integers = self.value(Arange(sympy.Integer(1), expression + 1))
        return self.op("Gather", integers, self.constant(-1), axis=0)

    # ---- the finished graph

    def graph(self, name: str, outputs: dict[str, Val]) -> ir.Graph:
        """The finished graph, with its outputs by name."""
        results = []
        for label, val in outputs.items():
            value = self.value(val)
            if value.producer() is None or value in results:  # an input or a constant as it is
                value = self.op("Identity", value)
            value.name, value.shape = label, self.named_shape(val.shape)
            results.append(value)
        return ir.Graph(
            list(self.inputs.values()),
            results,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": OPSET} | {node.domain: 1 for node in self.nodes if node.domain},
            name=name,
        )
