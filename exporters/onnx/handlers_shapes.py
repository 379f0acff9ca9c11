"""Operations on shapes in ONNX: views, transpositions, slices, joins. Importing this module registers the handlers.

    x.flatten(0, 1)       no node: the two dimensions become one group of `Val.groups`
    x.unflatten(0, ...)   a Reshape with a constant target, or no node where it undoes a flatten
    x[:, :length]         a Slice, whose end a Shape node reads from a tensor of that length

No node computes with sizes: ONNX Runtime would do that on the CPU. Tensors of a dynamic size are slices of constant
tables, or sums with zeros of that size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import sympy
import torch
from torch import fx

from .graph_builder import Arange, Expr, Operand, Val
from .handlers_fft import Spectrum
from .translator import Translator, aten, axis_of, handles, onnx_axis, regroup, with_dim


@handles(aten.arange.default, aten.arange.start)
def _arange(t: Translator, node: fx.Node, *bounds: Expr, **_: Any) -> Arange:
    start, stop = bounds if len(bounds) == 2 else (sympy.Integer(0), *bounds)
    return Arange(sympy.sympify(start), stop, node.meta["val"].dtype)


@handles(aten.expand.default)
def _expand(t: Translator, node: fx.Node, x: Operand, sizes: Sequence[Any]) -> Val:
    """By adding zeros of the new shape: an Expand would need its sizes in one tensor."""
    dims, dtype = t.dims(node), node.meta["val"].dtype
    value = t.graph.value(x)
    old = (*[None] * (len(dims) - len(x.shape)), *x.shape)
    for axis, (dim, before) in enumerate(zip(dims, old, strict=True)):
        if dim != before:
            row, after = zero_vector(t, dim, dtype), list(range(1, len(dims) - axis))
            column = t.graph.op("Unsqueeze", row, t.graph.constant(after)) if after else row
            value = t.graph.op("Add", column, value)
    return Val.of(value, dims)


@handles(aten.unsqueeze.default)
def _unsqueeze(t: Translator, node: fx.Node, x: Operand, axis: int) -> Val:
    val = t.graph.val(x)
    groups = [*val.groups]
    groups.insert(axis % (len(groups) + 1), (sympy.Integer(1),))
    return regroup(t, val, tuple(groups))


@handles(aten.flatten.using_ints)
def _flatten(t: Translator, node: fx.Node, x: Operand, start: int = 0, end: int = -1) -> Val:
    """Joins dimensions without a node: the ONNX value keeps them, the Val has them in one group."""
    val = t.graph.val(x)
    first, last = axis_of(node, start), axis_of(node, end)
    joined = tuple(dim for group in val.groups[first : last + 1] for dim in group)
    return Val(val.value, (*val.groups[:first], joined, *val.groups[last + 1 :]))


@handles(aten.unflatten.int)
def _unflatten(t: Translator, node: fx.Node, x: Operand, axis: int, sizes: Sequence[Any]) -> Val:
    val, axis = t.graph.val(x), axis_of(node, axis)
    parts = tuple((dim,) for dim in t.dims(node)[axis : axis + len(sizes)])
    return regroup(t, val, (*val.groups[:axis], *parts, *val.groups[axis + 1 :]))


@handles(aten.view.default)
def _view(t: Translator, node: fx.Node, x: Operand, sizes: Sequence[Any]) -> Val:
    return t.graph.reshape(t.graph.val(x), t.dims(node))


@handles(aten.permute.default)
def _permute(t: Translator, node: fx.Node, x: Operand, order: Sequence[Any]) -> Val:
    return transposed(t, x, [int(axis) for axis in order])


@handles(aten.transpose.int, aten.mT.default)
def _transpose(t: Translator, node: fx.Node, x: Any, first: int = -2, second: int = -1) -> Any:
    if isinstance(x, Spectrum):  # always has its time last
        return x
    order = list(range(node.args[0].meta["val"].dim()))  # type: ignore[union-attr]
    order[first], order[second] = order[second], order[first]
    return transposed(t, x, order)


def transposed(t: Translator, x: Operand, order: Sequence[int]) -> Val:
    """Dimensions in another order. A transposition that undoes an earlier one adds no node."""
    val = t.graph.val(x)
    places = iter(range(len(val.dims)))
    grouped = [[next(places) for _ in group] for group in val.groups]
    perm, groups = [place for axis in order for place in grouped[axis]], tuple(val.groups[axis] for axis in order)
    producer = val.value.producer()
    if producer is not None and producer.op_type == "Transpose":
        earlier = producer.attributes["perm"].as_ints()
        if [earlier[place] for place in perm] == list(range(len(perm))):
            return Val(producer.inputs[0], groups)  # type: ignore[arg-type]
    return Val(t.graph.op("Transpose", val.value, perm=perm), groups)


@handles(aten.cat.default)
def _cat(t: Translator, node: fx.Node, parts: Sequence[Operand], axis: int = 0) -> Val:
    vals, axis = [t.graph.val(part) for part in parts], axis % node.meta["val"].dim()
    others = {(*val.groups[:axis], *val.groups[axis + 1 :]) for val in vals}
    if len(others) > 1 or any(len(val.groups[axis]) > 1 for val in vals):
        vals = [t.graph.reshape(val, val.shape) for val in vals]
    value = t.graph.op("Concat", *(val.value for val in vals), axis=onnx_axis(vals[0], axis))
    result = with_dim(vals[0], value, axis, t.dims(node)[axis])
    source = node.args[0][0]  # type: ignore[index]
    while source.target in (aten.unsqueeze.default, aten.index_select.default):  # type: ignore[union-attr,operator]
        source = source.args[0]  # type: ignore[union-attr]
    if source in t.inputs.values():
        t.ring_copies[source] = result, vals[0].shape[axis]  # type: ignore[index]
    return result


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
    parts = [t.graph.op("Gather", value, t.graph.constant(i), axis=axis_of(node, axis)) for i in range(count)]
    return [Val.of(part, t.dims(node, i)) for i, part in enumerate(parts)]


@handles(aten.select.int)
def _select(t: Translator, node: fx.Node, x: Operand, axis: int, index: Any) -> Val:
    val, axis = t.graph.val(x), axis_of(node, axis)
    if val.groups[axis] == (sympy.Integer(1),):
        return regroup(t, val, (*val.groups[:axis], *val.groups[axis + 1 :]))
    return t.op(node, "Gather", t.graph.value(x), t.graph.constant(int(index)), axis=axis)


@handles(aten.narrow.default)
def _narrow(t: Translator, node: fx.Node, x: Operand, axis: int, start: Any, length: Any) -> Val:
    return slice_of(t, node, x, axis, start, start + length)


@handles(aten.slice.Tensor)
def slice_of(t: Translator, node: fx.Node, x: Operand, axis: int = 0, start: Any = None, end: Any = None) -> Any:
    """A part of a dimension. An end that is a size of the graph is read from a tensor that has it."""
    val, axis = t.graph.val(x), axis_of(node, axis)
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
    value = t.graph.op("Slice", val.value, first, stop, t.graph.constant([onnx_axis(val, axis)]))
    return with_dim(val, value, axis, t.dims(node)[axis])


@handles(aten.flip.default)
def _flip(t: Translator, node: fx.Node, x: Operand, axes: Sequence[Any]) -> Val:
    places = ([-1] * len(axes), [-(2**62)] * len(axes), [int(axis) for axis in axes], [-1] * len(axes))
    return t.op(node, "Slice", t.graph.value(x), *(t.graph.constant(place) for place in places))


@handles(aten.pad.default)
def _pad(t: Translator, node: fx.Node, x: Operand, sizes: Sequence[Any]) -> Operand:
    """Zeros around, joined on: CUDA's Pad takes longer than all of a layer's products, and has no bfloat16."""
    if not all(sympy.sympify(size).is_number for size in sizes):
        raise ValueError(f"{node} pads by {sizes}, a size that is not known at export")
    value, dims, dtype = t.graph.value(x), [*x.shape], node.meta["val"].dtype
    for i, (before, after) in enumerate(zip(sizes[::2], sizes[1::2], strict=True)):
        axis = len(dims) - 1 - i
        front, back = (
            [zeros(t, (*dims[:axis], sympy.Integer(int(count)), *dims[axis + 1 :]), dtype)] if count else []
            for count in (before, after)
        )
        if front or back:
            value = t.graph.op("Concat", *front, value, *back, axis=axis)
            dims[axis] += int(before) + int(after)
    return Val.of(value, t.dims(node))


def zero_vector(t: Translator, dim: Expr, dtype: torch.dtype) -> ir.Value:
    """Zeros (dim), of a size that may be dynamic."""
    steps = t.graph.value(Arange(sympy.Integer(0), dim))
    return t.cast(t.graph.op("Sub", steps, steps), dtype)


def zeros(t: Translator, dims: tuple[Expr, ...], dtype: torch.dtype) -> ir.Value:
    """Zeros of a shape, made once, as a sum of vectors: a node that takes sizes would need them in one tensor."""

    def make() -> ir.Value:
        parts = []
        for axis, dim in enumerate(dims):
            vector = t.graph.constant([0] * int(dim), dtype) if dim.is_number else zero_vector(t, dim, dtype)
            others = [other for other in range(len(dims)) if other != axis]
            parts.append(t.graph.op("Unsqueeze", vector, t.graph.constant(others)) if others else vector)
        return functools.reduce(lambda a, b: t.graph.op("Add", a, b), parts)

    return t.graph.shared(("zeros", dims, dtype), make)
