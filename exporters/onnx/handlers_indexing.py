"""Reads and writes at indices in ONNX. Importing this module registers the handlers.

embedding(table, ids)                      ->  Gather(table, ids)
ring[rows, :, slots] = new                 ->  TensorScatter(ring, new, slots), which a runtime may do in place
x.index_select(0, arange(length))          ->  Slice(x, 0, length)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from .graph_builder import Arange, Const, Expr, Operand, Val
from .handlers_shapes import slice_of
from .translator import Translator, aten, axis_of, handles


@handles(aten.embedding.default)
def _embedding(t: Translator, node: fx.Node, table: Operand, ids: Operand) -> Val:
    return t.op(node, "Gather", t.graph.value(table), t.graph.value(ids), axis=0)


@handles(aten.index_select.default)
def _index_select(t: Translator, node: fx.Node, x: Operand, axis: int, index: Operand) -> Val:
    if isinstance(index, Arange) and index.start == 0:
        return slice_of(t, node, x, axis, 0, index.stop)
    return t.op(node, "Gather", t.graph.value(x), t.graph.value(index), axis=axis_of(node, axis))


@handles(aten.index.Tensor)
def _index(t: Translator, node: fx.Node, x: Operand, index: Sequence[Operand | None]) -> Val:
    """One index: Gather. Indices of adjacent dimensions: GatherND. Rows and slots of a ring: see `_ring_index`."""
    given = [i for i, one in enumerate(index) if one is not None]
    if len(given) == 1:
        (axis,) = given
        return t.op(node, "Gather", t.graph.value(x), t.graph.value(index[axis]), axis=axis)  # type: ignore[arg-type]
    if given == [0, 2]:
        copy = t.ring_copies.get(node.args[0])  # type: ignore[arg-type]
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
    """Integer tensors, broadcast to a common shape and stacked in a new last dimension: the indices of GatherND."""
    zero = parts[0]
    for part in parts[1:]:
        zero = t.graph.op("Add", zero, part)
    zero = t.graph.op("Sub", zero, zero)
    last = t.graph.constant([-1])
    return t.graph.op(
        "Concat", *(t.graph.op("Unsqueeze", t.graph.op("Add", part, zero), last) for part in parts), axis=-1
    )


def _ring_index(t: Translator, node: fx.Node, rows: Any, slots: Any, copy: tuple[Val, Expr] | None) -> ir.Value:
    """Indices of the tokens (B, T) of all heads in a ring (B, H, C, d), or in a tensor that begins with its slots.

    `copy` is such a tensor and the number of those slots: (B, H, blocks, C, d), whose first block is the ring, or
    (B, H, slots, d), which begins with all visible slots. A slot beyond them holds no visible token; the last one is
    read in its place.
    """
    heads, slots = node.meta["val"].shape[-2], t.graph.value(slots)
    in_blocks = copy is not None and len(copy[0].shape) == 5
    if copy is not None and not copy[1].is_number:
        last = t.graph.op("Sub", t.graph.number(copy[1]), t.graph.constant(1))
        slots = t.graph.shared(("visible", slots), lambda: t.graph.op("Min", slots, last))
    minus = t.graph.constant([-1])

    def make() -> ir.Value:
        row, slot = (t.graph.op("Unsqueeze", part, minus) for part in (t.graph.value(rows), slots))
        head = t.graph.value(Const(torch.arange(heads)))
        return _columns(t, [row, head, *([t.graph.constant(0)] if in_blocks else []), slot])

    return t.graph.shared(("ring", t.graph.value(rows), slots, heads, in_blocks), make)


@handles(aten.index_put_.default)
def _index_put(t: Translator, node: fx.Node, ring: Operand, index: Sequence[Any], new: Operand) -> Val:
    """Writes tokens (B, T, H, d) to consecutive slots of a ring (B, H, C, d), or one token (B, H, d) to one slot."""
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
    """Later nodes that read the written tensor read the new value."""
    written = node.args[0]
    assert isinstance(written, fx.Node)
    assert written.op == "placeholder"
    t.env[written] = new
    return new
