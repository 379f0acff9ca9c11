"""Reductions and matrix products in ONNX. Importing this module registers the handlers.

    linear(x (B, K), weight (N, K))  ->  Gemm(x, weight, transB=1)
    bmm(a (B*H, M, K), b (B*H, K, N))  ->  MatMul(a (B, H, M, K), b (B, H, K, N)): joined batches stay apart

Weights are read as they are stored. Large operands, such as a ring of keys, are never transposed: the product is turned
around instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from .graph_builder import Const, Operand, Val
from .handlers_shapes import transposed
from .translator import Translator, aten, handles, regroup


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


@handles(aten.linear.default)
def _linear(t: Translator, node: fx.Node, x: Operand, weight: Operand, bias: Operand | None = None) -> Val:
    """Reads the weight as it is stored: Gemm for x (B, K), else a Transpose that ONNX Runtime fuses into the MatMul."""
    rows, matrix, added = t.graph.value(x), t.graph.value(weight), [] if bias is None else [t.graph.value(bias)]
    if node.meta["val"].dim() == 2:
        return t.op(node, "Gemm", rows, matrix, *added, transB=1)
    product = t.op(node, "MatMul", rows, t.graph.op("Transpose", matrix, perm=[1, 0]))
    return t.op(node, "Add", product.value, *added) if added else product


@handles(aten.mm.default)
def _mm(t: Translator, node: fx.Node, a: Operand, b: Operand) -> Val:
    """a.T @ b as (b.T @ a).T: where a is transposed, transposing the small b instead leaves a as it is."""
    left, width = _ungrouped(t, t.graph.val(a), 1), t.dims(node)[-1]
    groups = (left.groups[0], (width,))
    if not _is_transposed(left):
        return Val(t.graph.op("MatMul", left.value, t.graph.value(b)), groups)
    turned = Const(b.tensor.T) if isinstance(b, Const) else transposed(t, b, [1, 0])
    product = t.graph.op("MatMul", t.graph.value(turned), left.value.producer().inputs[0])  # type: ignore[union-attr,arg-type]
    rank = len(left.dims)
    return Val(t.graph.op("Transpose", product, perm=[*range(rank - 2), rank - 1, rank - 2]), groups)


@handles(aten.bmm.default)
def _bmm(t: Translator, node: fx.Node, a: Operand, b: Operand) -> Val:
    """Joined batch dimensions stay apart. Joined rows become batch dimensions, over which b is broadcast."""
    left, right = _ungrouped(t, t.graph.val(a), 2), _ungrouped(t, _ungrouped(t, t.graph.val(b), 1), 2)
    if left.groups[0] != right.groups[0]:
        left, right = _ungrouped(t, left, 0), _ungrouped(t, right, 0)
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
    """One row times a transposed matrix, as the matrix times a column: the ring of keys is not transposed by a copy."""
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


def _ungrouped(t: Translator, val: Val, axis: int) -> Val:
    """The value with the group of one dimension joined to a dimension of the ONNX value."""
    groups = list(val.groups)
    groups[axis] = (sympy.expand(sympy.prod(groups[axis])),)
    return regroup(t, val, tuple(groups))
