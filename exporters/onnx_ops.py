"""From a stage's traced graph to ONNX: one function for each operation of PyTorch that the model uses.

Operations on constants alone are computed here and now. What a stage does in place becomes a new value of the tensor;
the writes into the rings are TensorScatter, which a runtime can let work in place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import sympy
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import Tensor, fx
from torch.utils._pytree import tree_any, tree_map

from .onnx_graph import FOUND, Const, Dims, Expr, GraphBuilder, Operand, Steps, Val
from .stages import Stage

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
        self.copies: dict[
            fx.Node, tuple[Val, Expr]
        ] = {}  # of the first slots of a ring, at the start of a larger tensor
        placeholders = stage.graph.graph.find_nodes(op="placeholder")
        self.inputs = dict(zip((one.name for one in stage.inputs), placeholders, strict=True))
        for name, node in self.inputs.items():
            self.env[node] = inputs[name]
            self._learn(node, inputs[name].shape)

    def _learn(self, node: fx.Node, dims: Dims) -> None:
        """What the stage's own symbols stand for."""
        for size, dim in zip(node.meta["val"].shape, dims, strict=True):
            if isinstance(size, torch.SymInt):
                (symbol,) = size.node.expr.free_symbols
                factor = sympy.expand(size.node.expr).coeff(symbol)
                rest = sympy.expand(size.node.expr - factor * symbol)
                self.symbols.setdefault(symbol, sympy.expand((dim - rest) / factor))

    def run(self) -> dict[str, Any]:
        """The stage's outputs by name, and its cache tensors as they are afterwards."""
        for node in self.stage.graph.graph.nodes:
            if node.op == "call_function" and node.target not in _NO_MEANING:
                self.env[node] = self._call(node)
            elif node.op == "call_function":
                self.env[node] = self.size(node.meta.get("val"))
        (results,) = self.stage.graph.graph.output_node().args
        outputs = {name: self.env[node] for name, node in zip(self.stage.outputs, results, strict=True)}  # type: ignore
        kept = {one.name: self.env[self.inputs[one.name]] for one in self.stage.inputs if one.kind == "cache"}
        return outputs | kept

    def _call(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if node.target is aten.item.default:
            self._find(node, value)
        if isinstance(value, torch.SymInt | torch.SymBool | int):
            return self.size(value)
        args, kwargs = (fx.node.map_arg(part, lambda n: self.env[n]) for part in (node.args, node.kwargs))
        if node.target is operator.getitem:
            return args[0][args[1]]
        if tree_any(lambda x: isinstance(x, Val | Steps) or (isinstance(x, Expr) and not x.is_number), (args, kwargs)):
            return self._handle(node, args, kwargs)
        return self._fold(node, args, kwargs)

    def _find(self, node: fx.Node, value: torch.SymInt) -> None:
        """A size that is read from a tensor's value."""
        symbol = value.node.expr
        self.symbols[symbol] = FOUND
        largest = int(value.node.shape_env.bound_sympy(symbol).upper)
        self.graph.find(self.graph.value(self.env[node.args[0]]), largest)  # type: ignore[index]

    def _handle(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.target not in HANDLERS:
            raise NotImplementedError(
                f"no translation of {node.target} to ONNX ({self.stage.name}); add one to {__name__}"
            )
        return HANDLERS[node.target](self, node, *args, **kwargs)

    def _fold(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """The result of an operation on constants."""
        numbers, options = tree_map(_as_torch, (args, kwargs))
        result = node.target(*numbers, **options)  # type: ignore[operator]
        return tree_map(lambda x: Const(x) if isinstance(x, Tensor) else x, result)

    # ---- what handlers ask

    def size(self, size: Any) -> Any:
        """A traced size in terms of B and the granules; other things as they are."""
        if isinstance(size, torch.SymInt):
            return sympy.expand(size.node.expr.subs(self.symbols))
        return sympy.Integer(size) if type(size) is int else size

    def dims(self, node: fx.Node, part: int | None = None) -> Dims:
        """The shape of a node's result."""
        value = node.meta["val"] if part is None else node.meta["val"][part]
        return tuple(self.size(size) for size in value.shape)

    def operand(self, x: Any, dtype: torch.dtype) -> ir.Value:
        """A tensor or a number as a value of the dtype."""
        if isinstance(x, Expr):
            return self.cast(self.graph.number(x), dtype) if not x.is_number else self.graph.constant(int(x), dtype)
        if not isinstance(x, Val | Const | Steps):
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


def _as_torch(x: Any) -> Any:
    return x.tensor if isinstance(x, Const) else int(x) if isinstance(x, Expr) else x


def _axis(node: fx.Node, axis: int) -> int:
    """An axis counted from the front."""
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    return axis % rank


# ---- elementwise -----------------------------------------------------------------------------------------------------

BINARY = {
    **{aten.add.Tensor: "Add", aten.sub.Tensor: "Sub", aten.mul.Tensor: "Mul", aten.div.Tensor: "Div"},
    **{aten.minimum.default: "Min", aten.remainder.Scalar: "Mod", aten.floor_divide.default: "Div"},
}
COMPARE = {
    **{aten.le.Tensor: "LessOrEqual", aten.ge.Tensor: "GreaterOrEqual", aten.lt.Tensor: "Less"},
    **{aten.le.Scalar: "LessOrEqual", aten.ge.Scalar: "GreaterOrEqual", aten.lt.Scalar: "Less"},
    **{aten.gt.Scalar: "Greater", aten.eq.Scalar: "Equal"},
}
UNARY = {
    **{aten.exp.default: "Exp", aten.cos.default: "Cos", aten.sin.default: "Sin", aten.neg.default: "Neg"},
    **{aten.floor.default: "Floor", aten.reciprocal.default: "Reciprocal"},
}


@handles(*BINARY)
def _binary(t: Translator, node: fx.Node, a: Any, b: Any) -> Any:
    """Whole numbers are divided as if they were not negative, which those of the model are not."""
    if isinstance(a, Steps) and node.target is aten.add.Tensor and isinstance(b, int | sympy.Integer):
        return replace(a, start=a.start + b, stop=a.stop + b)
    dtype = node.meta["val"].dtype
    return t.op(node, BINARY[node.target], t.operand(a, dtype), t.operand(b, dtype))


@handles(*COMPARE)
def _compare(t: Translator, node: fx.Node, a: Any, b: Any) -> Val:
    dtype = node.args[0].meta["val"].dtype  # type: ignore[union-attr]
    return t.op(node, COMPARE[node.target], t.operand(a, dtype), t.operand(b, dtype))


@handles(*UNARY)
def _unary(t: Translator, node: fx.Node, x: Operand) -> Val:
    return t.op(node, UNARY[node.target], t.graph.value(x))


@handles(aten.__and__.Tensor)
def _and(t: Translator, node: fx.Node, a: Operand, b: Operand) -> Val:
    return t.op(node, "And", t.graph.value(a), t.graph.value(b))


@handles(aten.clamp.default)
def _clamp(t: Translator, node: fx.Node, x: Operand, low: Any = None, high: Any = None) -> Val:
    """Max, not Clip, which has no float64 kernel on CUDA."""
    dtype = node.meta["val"].dtype
    value = t.graph.value(x)
    if low is not None:
        value = t.graph.op("Max", value, t.operand(low, dtype))
    if high is not None:
        value = t.graph.op("Min", value, t.operand(high, dtype))
    return Val.of(value, t.dims(node))


@handles(aten.square.default)
def _square(t: Translator, node: fx.Node, x: Operand) -> Val:
    return t.op(node, "Mul", t.graph.value(x), t.graph.value(x))


@handles(aten.rsqrt.default)
def _rsqrt(t: Translator, node: fx.Node, x: Operand) -> Val:
    return t.op(node, "Reciprocal", t.graph.op("Sqrt", t.graph.value(x)))


@handles(aten.silu.default)
def _silu(t: Translator, node: fx.Node, x: Operand) -> Val:
    value = t.graph.value(x)
    return t.op(node, "Mul", value, t.graph.op("Sigmoid", value))


@handles(aten.to.dtype)
def _to(t: Translator, node: fx.Node, x: Operand, dtype: torch.dtype) -> Val:
    return Val.of(t.cast(t.graph.value(x), dtype), t.dims(node))


@handles(aten.where.self, aten.where.ScalarOther)
def _where(t: Translator, node: fx.Node, condition: Operand, a: Any, b: Any) -> Val:
    """Among booleans by And and Or: Where has no kernel for them on CUDA."""
    dtype, chosen = node.meta["val"].dtype, t.graph.value(condition)
    yes, no = t.operand(a, dtype), t.operand(b, dtype)
    if dtype != torch.bool:
        return t.op(node, "Where", chosen, yes, no)
    otherwise = t.graph.op("And", t.graph.op("Not", chosen), no)
    return t.op(node, "Or", t.graph.op("And", chosen, yes), otherwise)


@handles(aten.clone.default, aten.detach.default)
def _same(t: Translator, node: fx.Node, x: Operand, memory_format: Any = None) -> Operand:
    return x


# ---- sizes and order -------------------------------------------------------------------------------------------------


@handles(aten.arange.default, aten.arange.start)
def _arange(t: Translator, node: fx.Node, *bounds: Expr, **_: Any) -> Steps:
    start, stop = bounds if len(bounds) == 2 else (sympy.Integer(0), *bounds)
    return Steps(sympy.sympify(start), stop, node.meta["val"].dtype)


@handles(aten.expand.default)
def _expand(t: Translator, node: fx.Node, x: Operand, sizes: Sequence[Any]) -> Val:
    """By adding zeros of the new shape: an Expand would need its sizes in one tensor."""
    dims, dtype = t.dims(node), node.meta["val"].dtype
    value = t.graph.value(x)
    old = (*[None] * (len(dims) - len(x.shape)), *x.shape)
    for axis, (dim, before) in enumerate(zip(dims, old, strict=True)):
        if dim != before:
            steps = t.graph.value(Steps(sympy.Integer(0), dim))
            zeros = t.cast(t.graph.op("Sub", steps, steps), dtype)
            after = list(range(1, len(dims) - axis))
            column = t.graph.op("Unsqueeze", zeros, t.graph.constant(after)) if after else zeros
            value = t.graph.op("Add", column, value)
    return Val.of(value, dims)


@handles(aten.unsqueeze.default)
def _unsqueeze(t: Translator, node: fx.Node, x: Operand, axis: int) -> Val:
    val = t.graph.val(x)
    groups = [*val.groups]
    groups.insert(axis % (len(groups) + 1), (sympy.Integer(1),))
    return _regroup(t, val, tuple(groups))


def _regroup(t: Translator, val: Val, groups: tuple[Dims, ...]) -> Val:
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
    except ValueError:  # out with the old ones, in with the new
        old = [i for i, dim in enumerate(val.dims) if dim == 1]
        value = t.graph.op("Squeeze", val.value, t.graph.constant(old)) if old else val.value
        if rest != [d for d in val.dims if d != 1]:
            raise
        return Val(t.graph.op("Unsqueeze", value, t.graph.constant(ones)) if ones else value, groups)


@handles(aten.flatten.using_ints)
def _flatten(t: Translator, node: fx.Node, x: Operand, start: int = 0, end: int = -1) -> Val:
    """Joins dimensions, on paper."""
    val = t.graph.val(x)
    first, last = _axis(node, start), _axis(node, end)
    joined = tuple(dim for group in val.groups[first : last + 1] for dim in group)
    return Val(val.value, (*val.groups[:first], joined, *val.groups[last + 1 :]))


@handles(aten.unflatten.int)
def _unflatten(t: Translator, node: fx.Node, x: Operand, axis: int, sizes: Sequence[Any]) -> Val:
    val, axis = t.graph.val(x), _axis(node, axis)
    parts = tuple((dim,) for dim in t.dims(node)[axis : axis + len(sizes)])
    return _regroup(t, val, (*val.groups[:axis], *parts, *val.groups[axis + 1 :]))


@handles(aten.view.default)
def _view(t: Translator, node: fx.Node, x: Operand, sizes: Sequence[Any]) -> Val:
    return t.graph.reshape(t.graph.val(x), t.dims(node))


@handles(aten.permute.default)
def _permute(t: Translator, node: fx.Node, x: Operand, order: Sequence[Any]) -> Val:
    return _transposed(t, x, [int(axis) for axis in order])


@handles(aten.transpose.int, aten.mT.default)
def _transpose(t: Translator, node: fx.Node, x: Operand, first: int = -2, second: int = -1) -> Val:
    order = list(range(node.args[0].meta["val"].dim()))  # type: ignore[union-attr]
    order[first], order[second] = order[second], order[first]
    return _transposed(t, x, order)


def _transposed(t: Translator, x: Operand, order: Sequence[int]) -> Val:
    val = t.graph.val(x)
    places = iter(range(len(val.dims)))
    groups = [[next(places) for _ in group] for group in val.groups]
    perm = [place for axis in order for place in groups[axis]]
    return Val(t.graph.op("Transpose", val.value, perm=perm), tuple(val.groups[axis] for axis in order))


@handles(aten.cat.default)
def _cat(t: Translator, node: fx.Node, parts: Sequence[Operand], axis: int = 0) -> Val:
    vals, axis = [t.graph.val(part) for part in parts], axis % node.meta["val"].dim()
    others = {(*val.groups[:axis], *val.groups[axis + 1 :]) for val in vals}
    if len(others) > 1 or any(len(val.groups[axis]) > 1 for val in vals):
        vals = [t.graph.reshape(val, val.shape) for val in vals]
    value = t.graph.op("Concat", *(val.value for val in vals), axis=_place(vals[0], axis))
    result = _with_dim(vals[0], value, axis, t.dims(node)[axis])
    source = node.args[0][0]  # type: ignore[index]
    while source.target in (aten.unsqueeze.default, aten.index_select.default):  # type: ignore[union-attr]
        source = source.args[0]  # type: ignore[union-attr]
    if source in t.inputs.values():
        t.copies[source] = result, vals[0].shape[axis]  # type: ignore[index]
    return result


def _place(val: Val, axis: int) -> int:
    """Where a dimension is among those of the ONNX value."""
    return sum(len(group) for group in val.groups[:axis])


def _with_dim(val: Val, value: ir.Value, axis: int, dim: Expr) -> Val:
    """A value shaped as another one, but for the size of a dimension."""
    return Val(value, (*val.groups[:axis], (dim,), *val.groups[axis + 1 :]))


@handles(aten.stack.default)
def _stack(t: Translator, node: fx.Node, parts: Sequence[Operand], axis: int = 0) -> Val:
    axes = t.graph.constant([axis % node.meta["val"].dim()])
    return t.op(node, "Concat", *(t.graph.op("Unsqueeze", t.graph.value(p), axes) for p in parts), axis=axis)


@handles(aten.chunk.default)
def _chunk(t: Translator, node: fx.Node, x: Operand, count: Any, axis: int = 0) -> list[Val]:
    parts = t.graph.op("Split", t.graph.value(x), count=int(count), axis=axis, num_outputs=int(count))
    return [Val.of(part, t.dims(node, i)) for i, part in enumerate(parts)]


@handles(aten.unbind.int)
def _unbind(t: Translator, node: fx.Node, x: Operand, axis: int = 0) -> list[Val]:
    value, count = t.graph.value(x), len(node.meta["val"])
    parts = [t.graph.op("Gather", value, t.graph.constant(i), axis=_axis(node, axis)) for i in range(count)]
    return [Val.of(part, t.dims(node, i)) for i, part in enumerate(parts)]


@handles(aten.select.int)
def _select(t: Translator, node: fx.Node, x: Operand, axis: int, index: Any) -> Val:
    val, axis = t.graph.val(x), _axis(node, axis)
    if val.groups[axis] == (sympy.Integer(1),):
        return _regroup(t, val, (*val.groups[:axis], *val.groups[axis + 1 :]))
    return t.op(node, "Gather", t.graph.value(x), t.graph.constant(int(index)), axis=axis)


@handles(aten.narrow.default)
def _narrow(t: Translator, node: fx.Node, x: Operand, axis: int, start: Any, length: Any) -> Val:
    return _slice(t, node, x, axis, start, start + length)


@handles(aten.slice.Tensor)
def _slice(t: Translator, node: fx.Node, x: Operand, axis: int = 0, start: Any = None, end: Any = None) -> Any:
    """A part of a dimension. An end that is a size of the graph is read from a tensor that has it."""
    val, axis = t.graph.val(x), _axis(node, axis)
    if len(val.groups[axis]) > 1:
        val = t.graph.reshape(val, val.shape)
    end = sympy.Integer(2**62) if end is None else sympy.sympify(end)
    start = sympy.sympify(start or 0)
    missing = sympy.expand(end - val.shape[axis])
    if missing.is_number and missing >= 0 and start == 0:
        return val
    if end.is_number:
        stop = t.graph.constant([min(int(end), 2**62)])
    elif missing.is_number:
        stop = t.graph.constant([int(missing)] if missing < 0 else [2**62])
    else:
        stop = t.graph.size(end)
    first = t.graph.constant([int(start)]) if start.is_number else t.graph.size(start)
    value = t.graph.op("Slice", val.value, first, stop, t.graph.constant([_place(val, axis)]))
    return _with_dim(val, value, axis, t.dims(node)[axis])


@handles(aten.flip.default)
def _flip(t: Translator, node: fx.Node, x: Operand, axes: Sequence[Any]) -> Val:
    places = ([-1] * len(axes), [-(2**62)] * len(axes), [int(axis) for axis in axes], [-1] * len(axes))
    return t.op(node, "Slice", t.graph.value(x), *(t.graph.constant(place) for place in places))


@handles(aten.pad.default)
def _pad(t: Translator, node: fx.Node, x: Operand, sizes: Sequence[Any]) -> Operand:
    """Zeros around; in float32 where CUDA's Pad does not know the dtype."""
    if not any(sizes):
        return x
    if not all(sympy.sympify(size).is_number for size in sizes):
        raise ValueError(f"{node} pads by {sizes}, a size that is not known at export")
    rank, dtype = node.meta["val"].dim(), node.meta["val"].dtype
    before, after = [0] * rank, [0] * rank
    for i in range(0, len(sizes), 2):
        before[rank - 1 - i // 2], after[rank - 1 - i // 2] = int(sizes[i]), int(sizes[i + 1])
    value = t.graph.value(x)
    wide = t.cast(value, torch.float32) if dtype == torch.bfloat16 else value
    padded = t.graph.op("Pad", wide, t.graph.constant([*before, *after]))
    return Val.of(t.cast(padded, dtype), t.dims(node))


# ---- reductions and products -----------------------------------------------------------------------------------------


@handles(aten.mean.dim)
def _mean(t: Translator, node: fx.Node, x: Operand, axes: Sequence[Any], keep: bool = False) -> Val:
    return t.op(node, "ReduceMean", t.graph.value(x), t.graph.constant([int(a) for a in axes]), keepdims=int(keep))


@handles(aten.sum.dim_IntList)
def _sum(t: Translator, node: fx.Node, x: Operand, axes: Sequence[Any], keep: bool = False) -> Val:
    return t.op(node, "ReduceSum", t.graph.value(x), t.graph.constant([int(a) for a in axes]), keepdims=int(keep))


@handles(aten.var_mean.correction)
def _var_mean(t: Translator, node: fx.Node, x: Operand, axes: Sequence[Any], correction: Any = 0) -> list[Val]:
    value, at = t.graph.value(x), t.graph.constant([int(axis) for axis in axes])
    mean = t.graph.op("ReduceMean", value, at, keepdims=1)
    apart = t.graph.op("Sub", value, mean)
    var = t.graph.op("ReduceMean", t.graph.op("Mul", apart, apart), at, keepdims=0)
    return [Val.of(var, t.dims(node, 0)), Val.of(t.graph.op("Squeeze", mean, at), t.dims(node, 1))]


@handles(aten.max.default)
def _max(t: Translator, node: fx.Node, x: Operand) -> Val:
    return t.op(node, "ReduceMax", t.graph.value(x), keepdims=0)


@handles(aten.softmax.int)
def _softmax(t: Translator, node: fx.Node, x: Operand, axis: int) -> Val:
    val = t.graph.val(x)
    if len(val.groups[axis]) > 1 or axis != -1:
        raise ValueError(f"{node} is a softmax over joined dimensions or not over the last one")
    return Val(t.graph.op("Softmax", val.value, axis=-1), val.groups)


@handles(aten.layer_norm.default)
def _layer_norm(
    t: Translator, node: fx.Node, x: Operand, shape: Sequence[Any], weight: Any, bias: Any, eps: float, *_: Any
) -> Val:
    ones = torch.ones([int(size) for size in shape], dtype=node.meta["val"].dtype)
    inputs = [t.graph.value(part) for part in (x, weight or Const(ones), *([bias] if bias is not None else []))]
    return t.op(node, "LayerNormalization", *inputs, axis=-len(ones.shape), epsilon=eps)


@handles(aten.embedding.default)
def _embedding(t: Translator, node: fx.Node, table: Operand, ids: Operand) -> Val:
    return t.op(node, "Gather", t.graph.value(table), t.graph.value(ids), axis=0)


@handles(aten.linear.default)
def _linear(t: Translator, node: fx.Node, x: Operand, weight: Operand, bias: Operand | None = None) -> Val:
    """Reads the weight as it is stored: Gemm for rows (B, K), else a product that ONNX Runtime joins to a Transpose."""
    rows, matrix, added = t.graph.value(x), t.graph.value(weight), [] if bias is None else [t.graph.value(bias)]
    if node.meta["val"].dim() == 2:
        return t.op(node, "Gemm", rows, matrix, *added, transB=1)
    product = t.op(node, "MatMul", rows, t.graph.op("Transpose", matrix, perm=[1, 0]))
    return t.op(node, "Add", product.value, *added) if added else product


@handles(aten.mm.default)
def _mm(t: Translator, node: fx.Node, a: Operand, b: Operand) -> Val:
    left = _whole(t, t.graph.val(a), 1)
    value = t.graph.op("MatMul", left.value, t.graph.value(b))
    return Val(value, (left.groups[0], (t.dims(node)[-1],)))


@handles(aten.bmm.default)
def _bmm(t: Translator, node: fx.Node, a: Operand, b: Operand) -> Val:
    """Joined batches stay apart; rows that are joined become more batches, over which the other factor is repeated."""
    left, right = _whole(t, t.graph.val(a), 2), _whole(t, _whole(t, t.graph.val(b), 1), 2)
    if left.groups[0] != right.groups[0]:
        left, right = _whole(t, left, 0), _whole(t, right, 0)
    if left.groups[1] == (sympy.Integer(1),) and _is_transposed(right):
        return _one_row(t, left, right)
    rows, repeated = left.groups[1], right.value
    if len(rows) > 1:
        start = len(left.groups[0])
        repeated = t.graph.op("Unsqueeze", repeated, t.graph.constant([start + i for i in range(len(rows) - 1)]))
    value = t.graph.op("MatMul", left.value, repeated)
    return Val(value, (left.groups[0], rows, (t.dims(node)[-1],)))


def _is_transposed(val: Val) -> bool:
    producer = val.value.producer()
    if producer is None or producer.op_type != "Transpose":
        return False
    perm = list(producer.attributes["perm"].as_ints())
    return perm == [*range(len(perm) - 2), len(perm) - 1, len(perm) - 2]


def _one_row(t: Translator, left: Val, right: Val) -> Val:
    """One row times a transposed matrix, as the matrix times a column: a ring of keys is not copied to turn it."""
    (batch, (one,), (inner,)), (columns,) = left.groups, right.groups[2]
    column = t.graph.reshape(left, (*batch, inner, one))
    product = t.graph.op("MatMul", right.value.producer().inputs[0], column.value)  # type: ignore[union-attr]
    groups = (batch, (one,), (columns,))
    return t.graph.reshape(Val.of(product, (*batch, columns, one)), (*batch, one, columns), groups)


@handles(aten.baddbmm.default)
def _baddbmm(t: Translator, node: fx.Node, x: Operand, a: Operand, b: Operand) -> Val:
    product, added = _bmm(t, node, a, b), t.graph.val(x)
    same = added if added.groups == product.groups else t.graph.reshape(added, product.dims)
    return Val(t.graph.op("Add", same.value, product.value), product.groups)


def _whole(t: Translator, val: Val, axis: int) -> Val:
    """The value with one of its dimensions not joined of others."""
    groups = list(val.groups)
    groups[axis] = (sympy.expand(sympy.prod(groups[axis])),)
    return _regroup(t, val, tuple(groups))


# ---- places ----------------------------------------------------------------------------------------------------------


@handles(aten.index_select.default)
def _index_select(t: Translator, node: fx.Node, x: Operand, axis: int, index: Operand) -> Val:
    if isinstance(index, Steps) and index.start == 0:
        return _slice(t, node, x, axis, 0, index.stop)
    return t.op(node, "Gather", t.graph.value(x), t.graph.value(index), axis=_axis(node, axis))


@handles(aten.index.Tensor)
def _index(t: Translator, node: fx.Node, x: Operand, index: Sequence[Operand | None]) -> Val:
    """One index: Gather. Several, one after the other: GatherND. Rows and slots of a ring: see `_ring_index`."""
    given = [i for i, one in enumerate(index) if one is not None]
    if len(given) == 1:
        (axis,) = given
        return t.op(node, "Gather", t.graph.value(x), t.graph.value(index[axis]), axis=axis)  # type: ignore[arg-type]
    if given == [0, 2]:
        copy = t.copies.get(node.args[0])  # type: ignore[arg-type]
        at = _ring_index(t, node, index[0], index[2], copy)
        return t.op(node, "GatherND", t.graph.value(x) if copy is None else copy[0].value, at)
    first, second = (t.graph.value(index[axis]) for axis in given)  # type: ignore[arg-type]
    if given[1] != given[0] + 1 or given[0] > 1:
        raise NotImplementedError(f"{node} indexes the dimensions {given}; add a translation to {__name__}")
    at = _columns(t, [first, second])
    if given[0] == 0:
        return t.op(node, "GatherND", t.graph.value(x), at)
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    front = t.graph.op("Transpose", t.graph.value(x), perm=[1, 2, 0, *range(3, rank)])
    taken, found = t.graph.op("GatherND", front, at), node.args[1][given[1]].meta["val"].dim()  # type: ignore
    return t.op(node, "Transpose", taken, perm=[found, *range(found), *range(found + 1, rank + found - 2)])


def _columns(t: Translator, parts: Sequence[ir.Value]) -> ir.Value:
    """Whole numbers of shapes that broadcast, side by side in a last dimension of the common shape."""
    zero = parts[0]
    for part in parts[1:]:
        zero = t.graph.op("Add", zero, part)
    zero = t.graph.op("Sub", zero, zero)
    last = t.graph.constant([-1])
    return t.graph.op(
        "Concat", *(t.graph.op("Unsqueeze", t.graph.op("Add", part, zero), last) for part in parts), axis=-1
    )


def _ring_index(t: Translator, node: fx.Node, rows: Any, slots: Any, copy: tuple[Val, Expr] | None) -> ir.Value:
    """Where the tokens (B, T) of all heads are in a ring (B, H, C, d), or in a copy of it.

    A copy of the whole ring is the first block of (B, H, blocks, C.., d). A copy of its first slots, in
    (B, H, slots.., d), has all that is visible; for a slot beyond, of which nothing is visible, its last one stands in.
    """
    heads, slots = node.meta["val"].shape[-2], t.graph.value(slots)
    in_blocks = copy is not None and len(copy[0].shape) == 5
    if copy is not None and not copy[1].is_number:
        last = t.graph.op("Sub", t.graph.number(copy[1]), t.graph.constant(1))
        slots = t.graph.once(("visible", slots), lambda: t.graph.op("Min", slots, last))
    minus = t.graph.constant([-1])

    def make() -> ir.Value:
        row, slot = (t.graph.op("Unsqueeze", part, minus) for part in (t.graph.value(rows), slots))
        head = t.graph.value(Const(torch.arange(heads)))
        return _columns(t, [row, head, *([t.graph.constant(0)] if in_blocks else []), slot])

    return t.graph.once(("ring", t.graph.value(rows), slots, heads, in_blocks), make)


@handles(aten.index_put_.default)
def _index_put(t: Translator, node: fx.Node, ring: Operand, index: Sequence[Any], new: Operand) -> Val:
    """Writes tokens of consecutive slots, new (B, T, H, d) or of one, (B, H, d), into a ring (B, H, C, d)."""
    slots, value = t.graph.value(index[2]), t.graph.value(new)
    if node.args[1][2].meta["val"].dim() == 1:  # type: ignore
        update = t.graph.op("Unsqueeze", value, t.graph.constant([2]))
    else:
        update = t.graph.op("Transpose", value, perm=[0, 2, 1, 3])
        slots = t.graph.op("Gather", slots, t.graph.constant(0), axis=1)
    result = t.op(node, "TensorScatter", t.graph.value(ring), update, slots, axis=2, mode="circular")
    return _store(t, node, result)


@handles(aten.copy_.default)
def _copy(t: Translator, node: fx.Node, old: Operand, new: Operand) -> Operand:
    return _store(t, node, new)


@handles(aten.add_.Tensor)
def _add_in_place(t: Translator, node: fx.Node, x: Operand, y: Any) -> Operand:
    dtype = node.meta["val"].dtype
    return _store(t, node, t.op(node, "Add", t.operand(x, dtype), t.operand(y, dtype)))


def _store(t: Translator, node: fx.Node, new: Any) -> Any:
    """From here on, the tensor that was written to is the new one."""
    written = node.args[0]
    assert isinstance(written, fx.Node)
    assert written.op == "placeholder"
    t.env[written] = new
    return new
