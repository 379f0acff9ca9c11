"""RMSNorm and LayerNorm of whole rows, one row a program."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import inverse_root, start, wait


@triton.jit
def megalodon_rms(
    y_ptr,
    lengths_ptr,
    weight_ptr,
    m_ptr,
    L,
    eps,
    D: tl.constexpr,
    D_P: tl.constexpr,
    AFFINE: tl.constexpr,
    PDL: tl.constexpr,
):
    """m (B, L, D) = RMSNorm of y (B, L, D) float32, zeros where not valid."""
    start(PDL)
    token = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, D_P)
    ok = k < D
    scale = tl.full((D_P,), 1.0, tl.float32)
    if AFFINE:
        scale += tl.load(weight_ptr + k, mask=ok, other=0.0).to(tl.float32)
    wait(PDL)
    valid = token < tl.load(lengths_ptr + b)
    at = (b * L + token) * D + k
    y = tl.load(y_ptr + at, mask=ok & valid, other=0.0)
    m = y * inverse_root(tl.sum(y * y, 0) / D, eps) * scale
    tl.store(m_ptr + at, m.to(m_ptr.dtype.element_ty), mask=ok)


@triton.jit
def scale_and_shift(weight_ptr, bias_ptr, k, K: tl.constexpr, AFFINE: tl.constexpr):
    """What a LayerNorm's result is multiplied by, weight + 1, and what is added to it."""
    scale = tl.full(k.shape, 1.0, tl.float32)
    shift = tl.zeros(k.shape, tl.float32)
    if AFFINE:
        scale += tl.load(weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        shift += tl.load(bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    return scale, shift


@triton.jit
def layer_norm(x, k, eps, scale, shift, K: tl.constexpr):
    """LayerNorm of one row x (K) float32, 0 beyond K."""
    centred = tl.where(k < K, x - tl.sum(x, 0) / K, 0.0)
    return centred * inverse_root(tl.sum(centred * centred, 0) / K, eps) * scale + shift


@triton.jit
def megalodon_layer_norm(
    first_ptr,
    second_ptr,
    third_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    eps,
    D: tl.constexpr,
    D_P: tl.constexpr,
    SUM: tl.constexpr,
    AFFINE: tl.constexpr,
    PDL: tl.constexpr,
):
    """y (rows, D) = LayerNorm(first), or LayerNorm(first + second + third) with SUM, each (rows, D)."""
    start(PDL)
    k = tl.arange(0, D_P)
    ok = k < D
    at = tl.program_id(0).to(tl.int64) * D + k
    scale, shift = scale_and_shift(weight_ptr, bias_ptr, k, D, AFFINE)
    wait(PDL)
    x = tl.load(first_ptr + at, mask=ok, other=0.0).to(tl.float32)
    if SUM:
        x += tl.load(second_ptr + at, mask=ok, other=0.0).to(tl.float32)
        x += tl.load(third_ptr + at, mask=ok, other=0.0).to(tl.float32)
    y = layer_norm(x, k, eps, scale, shift, D)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=ok)
