"""RMSNorm and LayerNorm of whole rows, one row a program, and TimestepNorm of one token."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import inverse_root, start, wait


@triton.jit
def timestep_norm(
    x_ptr,
    position_ptr,
    mean_ptr,
    var_ptr,
    b,
    group,
    channel,
    ok,
    weight,
    bias,
    eps,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    HF: tl.constexpr,
):
    """TimestepNorm of some groups of row b of x (B, D): y (groups, channels) float32, and the row's position.

    `channel`, whether it is one (`ok`), `weight` (with its 1) and `bias` are (groups, channels), too. The statistics of
    the groups change in place, after every thread has read what this reads.
    """
    D: tl.constexpr = G * GROUP
    group_ok = group < G
    x = tl.load(x_ptr + b * D + channel, mask=ok, other=0.0).to(tl.float32)
    mean_in = tl.load(mean_ptr + b * G + group, mask=group_ok, other=0.0)
    var_in = tl.load(var_ptr + b * G + group, mask=group_ok, other=1.0)
    position = tl.load(position_ptr + b)
    count = position.to(tl.float32)
    tl.debug_barrier()  # where threads hold copies of a state, none may write it before all have read it
    mu = tl.sum(x, 1) / GROUP
    within = tl.where(ok, x - mu[:, None], 0.0)
    share = 1.0 / (count + 1.0)
    delta = mu - mean_in
    mean = mean_in + delta * share
    between = delta * delta * count * share
    if HF:
        variance = tl.maximum((tl.maximum(count, 1.0) * var_in + between) * share, 1e-6)
    else:
        variance = (count * var_in + tl.sum(within * within, 1) / GROUP + between) * share
    tl.store(mean_ptr + b * G + group, mean, mask=group_ok)
    tl.store(var_ptr + b * G + group, variance, mask=group_ok)
    return (x - mean[:, None]) * inverse_root(variance, eps)[:, None] * weight + bias, position


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
