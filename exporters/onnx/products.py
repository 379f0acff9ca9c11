"""How ONNX says reductions, products, and reads and writes at places. Importing registers the handlers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import sympy
import torch
from torch import fx

from .graph import Const, Expr, Operand, Steps, Val
from .ops import slice_of, transposed
from .translator import Translator, aten, axis_of, handles, regroup

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
    """Columns times a matrix, as the matrix turned times columns that are not, so that nothing else is turned."""
    left, width = _whole(t, t.graph.val(a), 1), t.dims(node)[-1]
    groups = (left.groups[0], (width,))
    if not _is_transposed(left):
        return Val(t.graph.op("MatMul", left.value, t.graph.value(b)), groups)
    turned = Const(b.tensor.T) if isinstance(b, Const) else transposed(t, b, [1, 0])
    product = t.graph.op("MatMul", t.graph.value(turned), left.value.producer().inputs[0])  # type: ignore[union-attr,arg-type]
    rank = len(left.dims)
    return Val(t.graph.op("Transpose", product, perm=[*range(rank - 2), rank - 1, rank - 2]), groups)


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
    product = t.graph.op("MatMul", right.value.producer().inputs[0], column.value)  # type: ignore[union-attr,arg-type]
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
    return regroup(t, val, tuple(groups))


# ---- places ----------------------------------------------------------------------------------------------------------


@handles(aten.index_select.default)
def _index_select(t: Translator, node: fx.Node, x: Operand, axis: int, index: Operand) -> Val:
    if isinstance(index, Steps) and index.start == 0:
        return slice_of(t, node, x, axis, 0, index.stop)
    return t.op(node, "Gather", t.graph.value(x), t.graph.value(index), axis=axis_of(node, axis))


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
def _add_inplace(t: Translator, node: fx.Node, x: Operand, y: Any) -> Operand:
    dtype = node.meta["val"].dtype
    return _store(t, node, t.op(node, "Add", t.operand(x, dtype), t.operand(y, dtype)))


def _store(t: Translator, node: fx.Node, new: Any) -> Any:
    """From here on, the tensor that was written to is the new one."""
    written = node.args[0]
    assert isinstance(written, fx.Node)
    assert written.op == "placeholder"
    t.env[written] = new
    return new
