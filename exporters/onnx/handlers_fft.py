"""The FFT as real matrix products, since ONNX Runtime has no DFT on CUDA. Importing this module registers the handlers.

    rfft(x (B, L, D))  ->  Spectrum(re, im (B, D, N1, 32)): MatMul, Mul by the twiddle factors, MatMul

A transform of N = N1 N2 points, N2 = 32, is by Cooley-Tukey a transform over t1 of N1 points, a multiplication by
twiddle factors, and a transform over t2 of N2 points, for t = N2 t1 + t2 and k = k1 + N1 k2. N is at least twice the
longest length, so that a product of spectra is a causal convolution. Only the rows that hold tokens, t1 < L / N2, are
multiplied. Spectra stay in the order (k1, k2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import sympy
import torch
from torch import Tensor, fx

from ...model.config import BLOCK
from .graph_builder import Computed, Const, Dims, Expr, Operand, Val
from .translator import Translator, aten, handles


@dataclass(frozen=True, eq=False)
class Spectrum(Computed):
    """Real and imaginary parts (..., D, N1, N2) of a transform, and the shape of what was transformed, time last."""

    re: ir.Value
    im: ir.Value
    dims: Dims


def _angles(rows: int, columns: int, points: int) -> Tensor:
    """2 pi i j / points (rows, columns) in float64. The integers i j are reduced modulo `points` first: no rounding."""
    cycles = torch.outer(torch.arange(rows), torch.arange(columns)) % points
    return cycles.double() * (2 * math.pi / points)


def _pair(t: Translator, rows: int, columns: int, points: int) -> tuple[ir.Value, ir.Value]:
    """Cosines and sines of `_angles`, float32."""
    angles = _angles(rows, columns, points)
    parts = {"cos": angles.cos(), "sin": angles.sin()}
    cos, sin = (
        t.graph.shared((name, rows, columns, points), lambda part=part: t.graph.value(Const(part.float())))  # type: ignore
        for name, part in parts.items()
    )
    return cos, sin


def _outer_size(t: Translator) -> int:
    """N1."""
    return 2 * t.graph.largest(sympy.sympify(t.graph.length)) // BLOCK


def _outer(t: Translator, blocks: Expr) -> tuple[ir.Value, ir.Value]:
    """Cosines and sines (N1, L / N2) of the transform over t1, for the rows that hold tokens."""
    size = _outer_size(t)
    if blocks.is_number:
        return _pair(t, size, int(blocks), size)
    cos, sin = _pair(t, size, size // 2, size)
    ends = t.graph.constant([0]), t.graph.size(blocks), t.graph.constant([1])
    return t.graph.op("Slice", cos, *ends), t.graph.op("Slice", sin, *ends)


def _times(t: Translator, a: tuple[ir.Value, ir.Value], b: tuple[ir.Value, ir.Value], kind: str) -> tuple[Any, Any]:
    """Complex product, elementwise ("Mul") or of matrices ("MatMul")."""
    (ar, ai), (br, bi) = a, b
    re = t.graph.op("Sub", t.graph.op(kind, ar, br), t.graph.op(kind, ai, bi))
    return re, t.graph.op("Add", t.graph.op(kind, ar, bi), t.graph.op(kind, ai, br))


@handles(aten.fft_rfft.default)
def _rfft(t: Translator, node: fx.Node, x: Operand, n: Any = None, dim: Any = -1) -> Spectrum:
    """Of x (B, L, D) over L; of (D, L), over L."""
    val, rank = t.graph.val(x), len(x.shape)
    axis = int(dim) % rank
    value, dims = t.graph.value(val), list(val.shape)
    if axis == 1 and rank == 3:
        value, dims = t.graph.op("Transpose", value, perm=[0, 2, 1]), [dims[0], dims[2], dims[1]]
    size, blocks = _outer_size(t), sympy.expand(dims[-1] / BLOCK)
    rows = t.graph.reshape(Val.of(value, dims), (*dims[:-1], blocks, sympy.Integer(BLOCK))).value
    cos, sin = _outer(t, blocks)
    first = t.graph.op("MatMul", cos, rows), t.graph.op("Neg", t.graph.op("MatMul", sin, rows))
    cos, sin = _pair(t, size, BLOCK, size * BLOCK)
    turned = _times(t, first, (cos, t.graph.op("Neg", sin)), "Mul")
    cos, sin = _pair(t, BLOCK, BLOCK, BLOCK)
    re, im = _times(t, turned, (cos, t.graph.op("Neg", sin)), "MatMul")
    return Spectrum(re, im, tuple(dims))


@handles(aten.fft_irfft.default)
def _irfft(t: Translator, node: fx.Node, spectrum: Spectrum, n: Any = None, dim: Any = -1) -> Val:
    """To (B, L, D): of the 2L points that it could give, the first L."""
    size, dims = _outer_size(t), spectrum.dims
    blocks = sympy.expand(dims[-1] / BLOCK)
    inner = _times(t, (spectrum.re, spectrum.im), _pair(t, BLOCK, BLOCK, BLOCK), "MatMul")
    re, im = _times(t, inner, _pair(t, size, BLOCK, size * BLOCK), "Mul")
    cos, sin = (t.graph.op("Transpose", part, perm=[1, 0]) for part in _outer(t, blocks))
    real = t.graph.op("Sub", t.graph.op("MatMul", cos, re), t.graph.op("MatMul", sin, im))
    scaled = t.graph.op("Mul", real, t.graph.constant(1 / (size * BLOCK), torch.float32))
    joined = t.graph.reshape(Val.of(scaled, (*dims[:-1], blocks, sympy.Integer(BLOCK))), dims)
    return Val.of(t.graph.op("Transpose", joined.value, perm=[0, 2, 1]), (dims[0], dims[2], dims[1]))


def multiply(t: Translator, a: Spectrum, b: Spectrum) -> Spectrum:
    """The product of two spectra, of which one has no batch."""
    re, im = _times(t, (a.re, a.im), (b.re, b.im), "Mul")
    return Spectrum(re, im, max(a.dims, b.dims, key=len))
