"""From a stage's traced graph to ONNX: node by node, each by its handler in one of the `handlers_*.py`.

    %silu = torch.ops.aten.silu.default(%x)  ->  HANDLERS[aten.silu.default](translator, node, x)  ->  Mul, Sigmoid

An operation on constants alone is computed at export. A write in place gives the tensor a new value; writes into the
rings are TensorScatter, which a runtime may do in place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import sympy
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import Tensor, fx

from ..stages import Stage
from ..torch_internals import size_expression, size_symbol, symbol_bounds, tree_any, tree_map
from .graph_builder import DATA_SIZE, Arange, Computed, Const, Dims, Expr, GraphBuilder, Operand, Val

aten = torch.ops.aten
Handler = Callable[..., Any]
HANDLERS: dict[Any, Handler] = {}
_NO_MEANING = (aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten.sym_size.int)


def handles(*targets: Any) -> Callable[[Handler], Handler]:
    """Register a handler for operations."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(targets, handler))
        return handler

    return register


class Translator:
    """Translates one stage, with tensors of the graph as its inputs."""

    def __init__(self, graph: GraphBuilder, stage: Stage, inputs: Mapping[str, Operand]) -> None:
        self.graph, self.stage = graph, stage
        self.env: dict[fx.Node, Any] = {}
        self.symbols: dict[Any, Expr] = {}
        # For a ring: a tensor that begins with its slots, or with the first of them, and their number.
        self.ring_copies: dict[fx.Node, tuple[Val, Expr]] = {}
        placeholders = stage.graph.graph.find_nodes(op="placeholder")
        self.inputs = dict(zip((one.name for one in stage.inputs), placeholders, strict=True))
        for name, node in self.inputs.items():
            self.env[node] = inputs[name]
            self._learn(node, inputs[name].shape)

    def _learn(self, node: fx.Node, dims: Dims) -> None:
        """Express the symbols of the stage's sizes by the graph's."""
        for size, dim in zip(node.meta["val"].shape, dims, strict=True):
            if isinstance(size, torch.SymInt):
                symbol, expression = size_symbol(size), sympy.expand(size_expression(size))
                factor = expression.coeff(symbol)
                rest = sympy.expand(expression - factor * symbol)
                self.symbols.setdefault(symbol, sympy.expand((dim - rest) / factor))

    def run(self) -> dict[str, Any]:
        """The stage's outputs by name, and its arguments and cache tensors as they are afterwards."""
        for node in self.stage.graph.graph.nodes:
            if node.op == "call_function" and node.target not in _NO_MEANING:
                self.env[node] = self._call(node)
            elif node.op == "call_function":
                self.env[node] = self.size(node.meta.get("val"))
        (results,) = self.stage.graph.graph.output_node().args
        outputs = {name: self.env[node] for name, node in zip(self.stage.outputs, results, strict=True)}  # type: ignore
        kept = {
            one.name: self.env[self.inputs[one.name]] for one in self.stage.inputs if one.kind in ("argument", "cache")
        }
        return outputs | kept

    def _call(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if node.target is aten.item.default:
            self._read_data_size(value, self.env[node.all_input_nodes[0]])
        if isinstance(value, torch.SymInt | torch.SymBool | int):
            return self.size(value)
        parts: list[Any] = [fx.node.map_arg(part, lambda n: self.env[n]) for part in (node.args, node.kwargs)]
        args, kwargs = parts
        if node.target is operator.getitem:
            return args[0][args[1]]
        # The spectrum of a constant is not computed at export: it would be a complex tensor.
        if node.target is aten.fft_rfft.default or tree_any(_is_computed, (args, kwargs)):
            return self._handle(node, args, kwargs)
        return self._fold(node, args, kwargs)

    def _read_data_size(self, value: Any, tensor: Operand) -> None:
        """A size that a tensor's value gives is DATA_SIZE in the graph."""
        self.symbols[size_symbol(value)] = DATA_SIZE
        self.graph.add_data_size(self.graph.value(tensor), symbol_bounds(value)[1])

    def _handle(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.target not in HANDLERS:
            raise NotImplementedError(
                f"no translation of {node.target} to ONNX ({self.stage.name}); add one to {__name__}"
            )
        return HANDLERS[node.target](self, node, *args, **kwargs)

    def _fold(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """The result of an operation on constants, computed now."""
        numbers, options = tree_map(_as_torch, (args, kwargs))
        result = node.target(*numbers, **options)  # type: ignore[operator]
        return tree_map(lambda x: Const(x) if isinstance(x, Tensor) else x, result)

    # ---- used by handlers

    def size(self, size: Any) -> Any:
        """A traced size in terms of B and MULTIPLES; other arguments unchanged."""
        if isinstance(size, torch.SymInt):
            return sympy.expand(size_expression(size).subs(self.symbols))
        return sympy.Integer(size) if type(size) is int else size

    def dims(self, node: fx.Node, part: int | None = None) -> Dims:
        """The shape of a node's result."""
        value = node.meta["val"] if part is None else node.meta["val"][part]
        return tuple(self.size(size) for size in value.shape)

    def operand(self, x: Any, dtype: torch.dtype) -> ir.Value:
        """A tensor or a number as a value of the dtype."""
        if isinstance(x, sympy.Expr):
            return self.cast(self.graph.number(x), dtype) if not x.is_number else self.graph.constant(int(x), dtype)
        if not isinstance(x, Val | Const | Arange):
            return self.graph.constant(x, dtype)
        return self.cast(self.graph.value(x), dtype)

    def cast(self, value: ir.Value, dtype: torch.dtype) -> ir.Value:
        """The value in a dtype."""
        to = from_torch_dtype(dtype)
        return value if value.dtype == to else self.graph.op("Cast", value, dtype=dtype, to=int(to))

    def op(self, node: fx.Node, kind: str, *inputs: ir.Value, **attributes: Any) -> Val:
        """Add a node that computes what an operation of the stage does."""
        dtype = attributes.pop("dtype", node.meta["val"].dtype)
        return Val.of(self.graph.op(kind, *inputs, dtype=dtype, **attributes), self.dims(node))


def _is_computed(x: Any) -> bool:
    return isinstance(x, Computed) or (isinstance(x, sympy.Expr) and not x.is_number)


def _as_torch(x: Any) -> Any:
    return x.tensor if isinstance(x, Const) else int(x) if isinstance(x, sympy.Expr) else x


def axis_of(node: fx.Node, axis: int) -> int:
    """An axis counted from the front."""
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    return axis % rank


def regroup(t: Translator, val: Val, groups: tuple[Dims, ...]) -> Val:
    """The value in other groups of other dimensions; sizes of 1 that come or go need no sizes in the target."""
    dims = tuple(dim for group in groups for dim in group)
    if val.dims == dims:
        return Val(val.value, groups)
    ones = [i for i, dim in enumerate(dims) if dim == 1]
    rest = [dim for dim in dims if dim != 1]
    if rest == [d for d in val.dims if d != 1] and len(dims) - len(rest) > len(val.dims) - len(rest) == 0:
        return Val(t.graph.op("Unsqueeze", val.value, t.graph.constant(ones)), groups)
    try:
        return t.graph.reshape(val, dims, groups)
    except ValueError:  # drop the old sizes of 1, then add the new ones
        old = [i for i, dim in enumerate(val.dims) if dim == 1]
        value = t.graph.op("Squeeze", val.value, t.graph.constant(old)) if old else val.value
        if rest != [d for d in val.dims if d != 1]:
            raise
        return Val(t.graph.op("Unsqueeze", value, t.graph.constant(ones)) if ones else value, groups)


def onnx_axis(val: Val, axis: int) -> int:
    """The ONNX value's axis at which a dimension of the Val begins."""
    return sum(len(group) for group in val.groups[:axis])


def with_dim(val: Val, value: ir.Value, axis: int, dim: Expr) -> Val:
    """A Val of an ONNX value with the groups of another, one of which has a new size."""
    return Val(value, (*val.groups[:axis], (dim,), *val.groups[axis + 1 :]))
