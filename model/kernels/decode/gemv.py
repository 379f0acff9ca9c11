"""The GEMV path of a decode step: a weight times one vector, for each row of a small batch (`gemm.py: use_gemv`).

A Triton program holds some output features of the weight in registers and multiplies them by every row's vector, one
row after the other. The weight is read once. For one row this is the fastest form; every further row adds its latency,
so larger batches take the GEMM path (`gemm.py`).

    reference         `gemv_reference`, the product alone; `linear_reference` in `linear.py`, all that the kernel does
    device functions  `load_weight_tile`, `gemv_tile`, `gemv_registers`: the kernel's, and those of the GEMV kernels in
                      `projections.py` and `up_projection.py`
    kernel            `megalodon_linear_gemv`
    launch            `linear` in `linear.py`, with the sizes of `gemv_tile_sizes`
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import grid_dependency_wait, launch_dependents
from .weights import integer_to_float, load_output_features, weight_reference, weight_to_float

NARROW_COLUMNS = 2560  # input features of a weight up to which two or four warps hold its output features
_WARP_BYTES = 512  # of a weight's row that a warp takes with one load


def gemv_reference(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """x (B, K) times a stored weight (OUT, K) transposed: (B, OUT) float32."""
    return x.float() @ weight_reference(weight, scale).T


def gemv_tile_sizes(weight: Tensor, columns: int, features: int, warps: int) -> dict[str, int]:
    """FEATURES, the output features of a weight in one Triton program, and its warps: the given ones if K is small.

    A thread holds some 64 numbers of a weight. More features a program spare work that every program repeats, such as
    the LayerNorm of `up_projection`; fewer leave more programs to share the bytes. Each thread loads 16 bytes of each
    weight row; with less, the reduction goes through shared memory, which costs more than further features spare.
    """
    if columns > NARROW_COLUMNS:
        return {"FEATURES": 4 if columns <= 4096 else 2, "num_warps": 8}
    if weight.dtype == torch.uint8 or weight.shape[1] < min_columns(weight, warps):
        return {"FEATURES": 2, "num_warps": 2}
    return {"FEATURES": features, "num_warps": warps}


def min_columns(weight: Tensor, warps: int) -> int:
    """Columns of a weight that give each thread of so many warps 16 bytes of every weight row."""
    return warps * _WARP_BYTES // weight.element_size()


@triton.jit
def tile_columns(first_column, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
    """WIDTH columns from `first_column` on: (WIDTH). int4's columns are bytes, (WIDTH / GROUP, GROUP)."""
    if BITS == 4:
        group = tl.arange(0, WIDTH // GROUP)
        return first_column + group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    else:
        return first_column + tl.arange(0, WIDTH)


@triton.jit
def load_weight_tile(
    weight_ptr, scale_ptr,
    feature, first_column,
    OUT: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Output features `feature` of a weight (OUT, K), WIDTH columns from `first_column` on, into registers.

    -> (weight, low scales, high scales): the weight (features, WIDTH), for int4 (features, WIDTH / GROUP, GROUP); the
    scales (features), for int4 (features, WIDTH / GROUP) of the low and of the high half of K.
    """
    k = tile_columns(first_column, WIDTH, BITS, GROUP)
    long_feature, feature_ok = feature.to(tl.int64), feature < OUT
    if BITS == 4:
        HALF: tl.constexpr = K // 2
        ok = feature_ok[:, None, None] & (k < HALF)[None, :, :]
        weight = tl.load(weight_ptr + long_feature[:, None, None] * HALF + k[None, :, :], mask=ok, other=0)
        group = first_column // GROUP + tl.arange(0, WIDTH // GROUP)
        group_ok = feature_ok[:, None] & (group < HALF // GROUP)[None, :]
        scales = scale_ptr + long_feature[:, None] * (K // GROUP) + group[None, :]
        low = tl.load(scales, mask=group_ok, other=0.0)
        high = tl.load(scales + HALF // GROUP, mask=group_ok, other=0.0)
    else:
        ok = feature_ok[:, None] & (k < K)[None, :]
        weight = tl.load(weight_ptr + long_feature[:, None] * K + k[None, :], mask=ok, other=0)
        low = load_output_features(scale_ptr, feature, OUT) if BITS == 8 else tl.full(feature.shape, 1.0, tl.float32)
        high = low
    return weight, low, high


@triton.jit
def to_storing_threads(y):
    """A sum over columns (features), which every thread holds whole: each feature moves to the thread that stores it.

    It selects in registers. The compiler's own conversion of more than two features goes through shared memory, where
    all threads write to one place, and takes twice as many barriers.
    """
    feature = tl.arange(0, y.shape[0])
    out = tl.zeros(y.shape, tl.float32)
    for i in tl.static_range(y.shape[0]):
        out = tl.where(feature == i, tl.sum(tl.where(feature == i, y, 0.0), 0), out)
    return out


@triton.jit
def gemv_tile(
    tile, x_ptr, first_column,
    K: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of `load_weight_tile` times its columns of the vector x (K) in memory: (features) float32."""
    k = tile_columns(first_column, WIDTH, BITS, GROUP)
    if BITS == 4:
        HALF: tl.constexpr = K // 2
        low_x = tl.load(x_ptr + k, mask=k < HALF, other=0.0).to(tl.float32)
        high_x = tl.load(x_ptr + HALF + k, mask=k < HALF, other=0.0).to(tl.float32)
        byte = tile[0].to(tl.int32)
        low = tl.sum((integer_to_float(byte & 15) - 8.0) * low_x[None, :, :], 2)
        high = tl.sum((integer_to_float(byte >> 4) - 8.0) * high_x[None, :, :], 2)
        return tl.sum(low * tile[1] + high * tile[2], 1)
    else:
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        return gemv_registers(tile, x)


@triton.jit
def gemv_registers(tile, x):
    """A tile of floats or int8 times the vector x of all its columns, which is in registers: (features) float32."""
    y = tl.sum(weight_to_float(tile[0]) * x[None, :], 1)
    if y.shape[0] > 2:
        y = to_storing_threads(y)
    return y * tile[1]


@triton.jit
def megalodon_linear_gemv(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, alpha_ptr, first_ptr, second_ptr, y_ptr,
    B,
    OUT: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    HEAD: tl.constexpr, TAIL_P: tl.constexpr, FEATURES: tl.constexpr,
    BIAS: tl.constexpr, ALPHA: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y = first + second + alpha * (x W^T + bias); each of first, second, alpha and bias only if its flag is set.

    In: x (B, K); weight (OUT, K) as stored and its scales; bias, alpha (OUT); first, second (B, OUT). Out: y (B, OUT).
    Grid: (ceil(OUT / FEATURES),), FEATURES output features a Triton program for all B rows. Its tile of the weight,
    bias and alpha stay in registers over the loop of rows; sums are float32. The columns are split into HEAD, a power
    of two, and a tail padded to TAIL_P: less is masked than in one tile of all.
    """
    launch_dependents(PDL)
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    ok = feature < OUT
    weight = load_weight_tile(weight_ptr, scale_ptr, feature, 0, OUT, K, HEAD, BITS, GROUP)
    if TAIL_P > 0:
        tail = load_weight_tile(weight_ptr, scale_ptr, feature, HEAD, OUT, K, TAIL_P, BITS, GROUP)
    bias = tl.zeros((FEATURES,), tl.float32)
    alpha = tl.full((FEATURES,), 1.0, tl.float32)
    if BIAS:
        bias += load_output_features(bias_ptr, feature, OUT)
    if ALPHA:
        alpha = load_output_features(alpha_ptr, feature, OUT)
    grid_dependency_wait(PDL)
    for b in range(B):
        at = b * OUT + feature
        rest = tl.zeros((FEATURES,), tl.float32)
        if FIRST:
            rest += tl.load(first_ptr + at, mask=ok, other=0.0).to(tl.float32)
        if SECOND:
            rest += tl.load(second_ptr + at, mask=ok, other=0.0).to(tl.float32)
        y = gemv_tile(weight, x_ptr + b * K, 0, K, HEAD, BITS, GROUP) + bias
        if TAIL_P > 0:
            y += gemv_tile(tail, x_ptr + b * K, HEAD, K, TAIL_P, BITS, GROUP)
        y = y * alpha + rest
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=ok)
