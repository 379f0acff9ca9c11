"""Elementwise operations in ONNX. Importing this module registers the handlers.

    torch.ops.aten.silu(x)  ->  Mul(x, Sigmoid(x))

An operation that ONNX Runtime's CUDA provider lacks in some dtype is written with others that it has.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from .graph_builder import Arange, Const, Operand, Val
from .handlers_fft import Spectrum, multiply
from .translator import Translator, aten, handles

BINARY: dict[Any, str] = {
    **{aten.add.Tensor: "Add", aten.sub.Tensor: "Sub", aten.mul.Tensor: "Mul", aten.div.Tensor: "Div"},
    **{aten.minimum.default: "Min", aten.remainder.Scalar: "Mod", aten.floor_divide.default: "Div"},
}
COMPARE: dict[Any, str] = {
    **{aten.le.Tensor: "LessOrEqual", aten.ge.Tensor: "GreaterOrEqual", aten.lt.Tensor: "Less"},
    **{aten.le.Scalar: "LessOrEqual", aten.ge.Scalar: "GreaterOrEqual", aten.lt.Scalar: "Less"},
    **{aten.gt.Scalar: "Greater", aten.eq.Scalar: "Equal"},
}
UNARY: dict[Any, str] = {
    **{aten.exp.default: "Exp", aten.cos.default: "Cos", aten.sin.default: "Sin", aten.neg.default: "Neg"},
    **{aten.floor.default: "Floor", aten.reciprocal.default: "Reciprocal"},
}


@handles(*BINARY)
def _binary(t: Translator, node: fx.Node, a: Any, b: Any) -> Any:
    """Integer division truncates in ONNX, and rounds down in PyTorch: the same, as no integer here is negative."""
    if isinstance(a, Arange) and node.target is aten.add.Tensor and isinstance(b, int | sympy.Integer):
        return replace(a, start=a.start + b, stop=a.stop + b)
    if isinstance(a, Spectrum):
        return multiply(t, a, b)
    dtype = node.meta["val"].dtype
    if node.target is aten.mul.Tensor and isinstance(a, Val) and isinstance(b, Const):
        a = _of_rank(t, a, len(b.shape))
    return t.op(node, BINARY[node.target], t.operand(a, dtype), t.operand(b, dtype))


def _of_rank(t: Translator, x: Val, rank: int) -> Val:
    """x with sizes of 1 in front up to a rank.

    A product would broadcast x without them. onnxsim takes x over its root mean square, times a constant, for an
    RMSNormalization, and makes one that has no kernel where the constant has more dimensions than x.
    """
    missing = rank - len(x.shape)
    if missing <= 0 or not x.shape:
        return x
    value = t.graph.op("Unsqueeze", t.graph.value(x), t.graph.constant(list(range(missing))))
    return Val.of(value, (*[sympy.Integer(1)] * missing, *x.shape))


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
    """Booleans are selected by And and Or: ONNX Runtime's Where has no CUDA kernel for them."""
    dtype, chosen = node.meta["val"].dtype, t.graph.value(condition)
    yes, no = t.operand(a, dtype), t.operand(b, dtype)
    if dtype != torch.bool:
        return t.op(node, "Where", chosen, yes, no)
    otherwise = t.graph.op("And", t.graph.op("Not", chosen), no)
    return t.op(node, "Or", t.graph.op("And", chosen, yes), otherwise)


@handles(aten.clone.default, aten.detach.default)
def _same(t: Translator, node: fx.Node, x: Operand, memory_format: Any = None) -> Operand:
    return x
