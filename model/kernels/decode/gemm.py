"""The GEMM path of a decode step: a weight times a tile of the batch on the tensor cores, for larger batches.

The results are those of the GEMV path (`gemv.py`), which is faster up to MAX_GEMV_BATCH rows. Each weight is read once
for every BATCH_TILE rows of the batch.

    reference    `gemv.py: gemv_reference`, the same product
    device       `gemm_tile`, `gemm_tile_split_k`: shared by the kernels of `linear.py`, `projections.py`,
                 `up_projection.py`
    kernel       `megalodon_linear_gemm`, launched by `linear.py`
    launch       `gemm_tile_sizes`, `split_k_tile_sizes`; `path_factors` chooses between both paths
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import MAX_GEMV_BATCH
from ..launch import grid_dependency_wait, launch_dependents
from .gemv import NARROW_COLUMNS
from .weights import integer_to_float, load_output_features

_SPLIT_K_FEATURES = 2048  # a weight with fewer output features does not make enough tiles: K is split as well


def path_factors(batch: int) -> tuple[int, int]:
    """(use_gemv, use_gemm): (1, 0) up to MAX_GEMV_BATCH rows, (0, 1) above.

    Both multiply a launch grid, so that one of the two kernels has an empty grid. `batch` may be symbolic: a compiled
    program holds both launches and decides by its batch.
    """
    use_gemm = torch.sym_min(1, (batch - 1) // MAX_GEMV_BATCH)
    return 1 - use_gemm, use_gemm


def gemm_tile_sizes(features: int, x: Tensor, bits: int) -> dict[str, Any]:
    """Tile sizes for a weight with so many output features: enough tiles to fill a GPU, small enough for its memory.

    With few input features, a program takes many small steps of K, whose loads are all issued at once.
    """
    single = x.dtype == torch.float32
    shape = {"BATCH_TILE": 32 if single else 64, "FEATURES": 16 if features < _SPLIT_K_FEATURES else 32}
    shape |= {"K_TILE": 64, "STAGES": 4}
    if bits == 4:  # two halves of x, and scales for every byte
        shape["STAGES"] = 3
    elif not single:
        shape |= {"STAGES": 6} if x.shape[1] <= NARROW_COLUMNS else {"K_TILE": 128}
    return {**shape, "IEEE": single, "num_warps": 4}


def split_k_tile_sizes(features: int, x: Tensor, bits: int) -> dict[str, Any]:
    """`gemm_tile_sizes`, and SPLIT_K, the number of warps that share K where output features are few."""
    shape = gemm_tile_sizes(features, x, bits)
    if features >= _SPLIT_K_FEATURES or bits == 4:
        return {**shape, "SPLIT_K": 1}
    k_tile = 32 if x.dtype == torch.float32 else 64
    return {**shape, "BATCH_TILE": 16, "FEATURES": 16, "K_TILE": k_tile, "SPLIT_K": 4}


def feature_tiles(features: int, shape: dict[str, Any]) -> int:
    """Programs that share the output features of a weight, on either path."""
    return -(-features // shape["FEATURES"])


def batch_tiles(batch: int, shape: dict[str, Any]) -> int:
    """Programs that share the rows of the batch on the GEMM path."""
    return (batch + shape["BATCH_TILE"] - 1) // shape["BATCH_TILE"]


@triton.jit
def gemm_tile(
    x_ptr, weight_ptr, scale_ptr,
    b, feature, B,
    OUT: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BATCH_TILE: tl.constexpr, FEATURES: tl.constexpr, K_TILE: tl.constexpr, STAGES: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """Rows b of x (B, K) times output features `feature` of a weight (OUT, K): (BATCH_TILE, FEATURES) float32.

    The sums stay in registers over the loop of K; x and the weight pass through shared memory in STAGES buffers.
    """
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    STORED: tl.constexpr = K // 2 if BITS == 4 else K  # columns, of bytes for int4
    sums = tl.zeros((BATCH_TILE, FEATURES), tl.float32)
    x_rows = x_ptr + b[:, None] * K
    weights = weight_ptr + feature.to(tl.int64)[None, :] * STORED
    for k0 in tl.range(0, STORED, K_TILE, num_stages=STAGES):
        k = k0 + tl.arange(0, K_TILE)
        x_ok = (b < B)[:, None]
        weight_ok = (feature < OUT)[None, :]
        if STORED % K_TILE != 0:
            x_ok = x_ok & (k < STORED)[None, :]
            weight_ok = weight_ok & (k < STORED)[:, None]
        x = tl.load(x_rows + k[None, :], mask=x_ok, other=0.0)
        weight = tl.load(weights + k[:, None], mask=weight_ok, other=0)
        if BITS == 4:
            high_x = tl.load(x_rows + STORED + k[None, :], mask=x_ok, other=0.0)
            scales = scale_ptr + feature.to(tl.int64)[None, :] * (K // GROUP) + (k // GROUP)[:, None]
            byte = weight.to(tl.int32)
            low = (integer_to_float(byte & 15) - 8.0) * tl.load(scales, mask=weight_ok, other=0.0)
            high = (integer_to_float(byte >> 4) - 8.0) * tl.load(scales + STORED // GROUP, mask=weight_ok, other=0.0)
            sums = tl.dot(x, low.to(x.dtype), sums, input_precision=precision)
            sums = tl.dot(high_x, high.to(x.dtype), sums, input_precision=precision)
        else:
            sums = tl.dot(x, weight.to(x.dtype), sums, input_precision=precision)
    if BITS == 8:
        sums *= load_output_features(scale_ptr, feature, OUT)[None, :]
    return sums


@triton.jit
def gemm_tile_split_k(
    x_ptr, weight_ptr, scale_ptr,
    b, feature, B,
    OUT: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr,
    BATCH_TILE: tl.constexpr, FEATURES: tl.constexpr, K_TILE: tl.constexpr, SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """`gemm_tile` (no int4) by SPLIT_K warps, each of which sums its own part of K: (BATCH_TILE, FEATURES) float32.

    It is for weights with few output features. Their tiles are few, and a tile that goes through all of K takes as
    long as its steps.
    """
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    PART: tl.constexpr = (K + SPLIT_K * K_TILE - 1) // (SPLIT_K * K_TILE) * K_TILE
    first = tl.arange(0, SPLIT_K) * PART
    sums = tl.zeros((SPLIT_K, BATCH_TILE, FEATURES), tl.float32)
    for k0 in tl.range(0, PART, K_TILE, num_stages=STAGES):
        k = first[:, None] + k0 + tl.arange(0, K_TILE)[None, :]
        x_ok = (b < B)[None, :, None]
        weight_ok = (feature < OUT)[None, None, :]
        if PART * SPLIT_K != K:
            x_ok = x_ok & (k < K)[:, None, :]
            weight_ok = weight_ok & (k < K)[:, :, None]
        x = tl.load(x_ptr + (b * K)[None, :, None] + k[:, None, :], mask=x_ok, other=0.0)
        at = feature.to(tl.int64)[None, None, :] * K + k[:, :, None]
        weight = tl.load(weight_ptr + at, mask=weight_ok, other=0)
        sums = tl.dot(x, weight.to(x.dtype), sums, input_precision=precision)
    y = tl.sum(sums, 0)
    if BITS == 8:
        y *= load_output_features(scale_ptr, feature, OUT)[None, :]
    return y


@triton.jit
def megalodon_linear_gemm(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, alpha_ptr, first_ptr, second_ptr, y_ptr,
    B,
    OUT: tl.constexpr, K: tl.constexpr,
    BIAS: tl.constexpr, ALPHA: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr,
    BATCH_TILE: tl.constexpr, FEATURES: tl.constexpr, K_TILE: tl.constexpr, SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr, IEEE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y = first + second + alpha * (x W^T + bias); each of first, second, alpha and bias only if its flag is set.

    In: x (B, K); weight (OUT, K) as stored and its scales; bias, alpha (OUT); first, second (B, OUT). Out: y (B, OUT).
    Grid: (ceil(OUT / FEATURES), ceil(B / BATCH_TILE)). The tile of sums (BATCH_TILE, FEATURES) float32 stays in
    registers.
    """
    launch_dependents(PDL)
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    b = tl.program_id(1) * BATCH_TILE + tl.arange(0, BATCH_TILE)
    ok = (b < B)[:, None] & (feature < OUT)[None, :]
    grid_dependency_wait(PDL)
    if SPLIT_K > 1:
        y = gemm_tile_split_k(
            x_ptr, weight_ptr, scale_ptr, b, feature, B,
            OUT, K, BITS, BATCH_TILE, FEATURES, K_TILE, SPLIT_K, STAGES, IEEE,
        )  # fmt: skip
    else:
        y = gemm_tile(
            x_ptr, weight_ptr, scale_ptr, b, feature, B,
            OUT, K, BITS, GROUP, BATCH_TILE, FEATURES, K_TILE, STAGES, IEEE,
        )  # fmt: skip
    if BIAS:
        y += load_output_features(bias_ptr, feature, OUT)[None, :]
    if ALPHA:
        y *= load_output_features(alpha_ptr, feature, OUT)[None, :]
    at = b[:, None] * OUT + feature[None, :]
    if FIRST:
        y += tl.load(first_ptr + at, mask=ok, other=0.0).to(tl.float32)
    if SECOND:
        y += tl.load(second_ptr + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=ok)
