"""The GEMM path of a decode step: a weight times a tile of the batch on the tensor cores.

The results are those of the GEMV path (`gemv.py`). Each weight is read once for a tile of rows.

    reference    `gemv.py: gemv_reference`, the same product
    device       `gemm_product`, for the kernels of `linear.py`, `projections.py` and `up_projection.py`: that of
                 `fragments.py` for up to 16 rows of bfloat16 (with int4 for any number), else a loop of tiles through
                 shared memory
    kernel       `megalodon_linear_gemm`, launched by `linear.py`
    launch       `gemm_launches`: which tile sizes run for which batch; `use_gemv`: whether it is the GEMV path's
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import grid_dependency_wait, launch_dependents
from .fragments import fragment_product, fragment_sizes, fragments_fit, grouped_fragment_product
from .weights import integer_to_float, load_output_features, storage_format, weight_as

_MAX_GEMV_BATCH = 4  # where weights do not go straight into registers
_WIDE_FEATURES = 4096  # a weight with so many output features makes tiles enough to fill a GPU without SPLIT_K
_INTEGER_WIDE_FEATURES = 8192  # the same for int8, whose tiles take less time


def _max_gemv_batch(x: Tensor, weight: Tensor, scale: Tensor | None) -> int:
    """Rows of a batch up to which a step takes the GEMV path.

    Every further row adds its latency there. Where weights go straight into the registers of tensor cores, the GEMM
    path is faster from two rows on, and with integers from one row on.
    """
    if not _takes_fragments(x, weight, scale):
        return _MAX_GEMV_BATCH
    return 1 if scale is None else 0


def use_gemv(batch: int, x: Tensor, weight: Tensor, scale: Tensor | None) -> int:
    """1 if a step of so many rows takes the GEMV path, else 0: a factor of its kernel's grid."""
    return _at_most(batch, _max_gemv_batch(x, weight, scale))


def gemm_launches(
    batch: int, features: int, x: Tensor, weight: Tensor, scale: Tensor | None
) -> list[tuple[int, dict[str, Any]]]:
    """The launches of a GEMM kernel: for each a factor of its grid and its tile sizes.

    One factor is 1 and the others 0; on the GEMV path all are 0. `batch` may be symbolic: a compiled program holds
    all launches and decides by its batch, since an empty grid launches nothing. `features` are those of all weights
    that the kernel multiplies.
    """
    form = storage_format(weight, scale, x.shape[1])
    tiles: list[tuple[int | None, dict[str, Any]]] = []  # the last batch of each
    if _takes_fragments(x, weight, scale):
        for rows in (8, 16, 32)[: 3 if form["BITS"] == 4 else 2]:
            last = rows if rows < 32 else None
            tiles.append((last, fragment_sizes(form["BITS"], form["GROUP"], features, x.shape[1], rows)))
    if not tiles or tiles[-1][0]:
        tiles.append((None, tile_sizes(features, x, form["BITS"])))
    below = use_gemv(batch, x, weight, scale)
    launches = []
    for last, sizes in tiles:
        up_to = 1 if last is None else _at_most(batch, last)
        launches.append((up_to - below, sizes))
        below = up_to
    return launches


def _takes_fragments(x: Tensor, weight: Tensor, scale: Tensor | None) -> bool:
    group = storage_format(weight, scale, x.shape[1])["GROUP"]
    return x.dtype == torch.bfloat16 and torch.version.hip is None and fragments_fit(weight, x.shape[1], group)


def _at_most(batch: int, rows: int) -> int:
    """1 if batch <= rows, else 0, also for a symbolic batch, which is at least 1."""
    return 1 - torch.sym_min(1, (batch - 1) // rows) if rows else 0


def tile_sizes(features: int, x: Tensor, bits: int) -> dict[str, Any]:
    """Sizes of tiles that go through shared memory: enough tiles to fill a GPU, small enough for its memory.

    A weight with few output features makes few tiles, each of which takes as long as its steps. There SPLIT_K warps
    share K.
    """
    single = x.dtype == torch.float32
    if bits == 4:  # two halves of x, and scales for every byte
        shape = {"ROWS": 32, "FEATURES": 16 if features < 2048 else 32, "K_TILE": 64, "SPLIT_K": 1, "STAGES": 3}
    elif features >= (_INTEGER_WIDE_FEATURES if bits else _WIDE_FEATURES):
        shape = {"ROWS": 64, "FEATURES": 64, "K_TILE": 128, "SPLIT_K": 1, "STAGES": 4 if bits else 3}
    elif bits == 8:
        shape = {"ROWS": 32, "FEATURES": 16 if features < 2048 else 32, "K_TILE": 128, "SPLIT_K": 4, "STAGES": 4}
    else:
        shape = {"ROWS": 32, "FEATURES": 16, "K_TILE": 64, "SPLIT_K": 4, "STAGES": 6}
    if single and bits != 4:  # twice the bytes
        shape |= {"ROWS": min(shape["ROWS"], 32), "FEATURES": 16 if features < 2048 else 32}
        shape |= {"K_TILE": 32 if shape["SPLIT_K"] > 1 else 64, "STAGES": 4}
    return {**shape, "FRAGMENTS": False, "IEEE": single, "num_warps": 4}


def feature_tiles(features: int, shape: dict[str, Any]) -> int:
    """Programs that share the output features of a weight, on either path."""
    return -(-features // shape["FEATURES"])


def batch_tiles(batch: int, shape: dict[str, Any]) -> int:
    """Programs that share the rows of the batch on the GEMM path."""
    return (batch + shape["ROWS"] - 1) // shape["ROWS"]


@triton.jit
def gemm_product(
    x_ptr, weight_ptr, scale_ptr,
    first_feature, first_row, B,
    OUT: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, K_TILE: tl.constexpr, SPLIT_K: tl.constexpr, STAGES: tl.constexpr,
    FRAGMENTS: tl.constexpr, IEEE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """FEATURES output features of a weight (OUT, K) times ROWS rows of x (B, K): (FEATURES, ROWS) float32.

    It waits for the kernel in front before it reads x.
    """
    if FRAGMENTS and BITS == 4:
        y = grouped_fragment_product(
            x_ptr, weight_ptr, scale_ptr, first_feature, first_row, B,
            OUT, K, GROUP, ROWS, FEATURES, K_TILE, SPLIT_K, STAGES, PDL,
        )  # fmt: skip
    elif FRAGMENTS:
        y = fragment_product(
            x_ptr, weight_ptr, scale_ptr, first_feature, first_row, B,
            OUT, K, BITS, ROWS, FEATURES, K_TILE, SPLIT_K, STAGES, PDL,
        )  # fmt: skip
    else:
        grid_dependency_wait(PDL)
        feature = first_feature + tl.arange(0, FEATURES)
        b = first_row + tl.arange(0, ROWS)
        if SPLIT_K > 1:
            y = split_k_product(x_ptr, weight_ptr, b, feature, B, OUT, K, ROWS, FEATURES, K_TILE, SPLIT_K, STAGES, IEEE)
        else:
            y = tile_product(
                x_ptr, weight_ptr, scale_ptr, b, feature, B, OUT, K, BITS, GROUP, ROWS, FEATURES, K_TILE, STAGES, IEEE
            )
        if BITS == 8:
            y *= load_output_features(scale_ptr, feature, OUT)[:, None]
    return y


@triton.jit
def tile_product(
    x_ptr, weight_ptr, scale_ptr,
    b, feature, B,
    OUT: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, K_TILE: tl.constexpr, STAGES: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """`gemm_product` without int8's scales: x and the weight pass through shared memory in STAGES buffers."""
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    STORED: tl.constexpr = K // 2 if BITS == 4 else K  # columns, of bytes for int4
    sums = tl.zeros((FEATURES, ROWS), tl.float32)
    x_rows = x_ptr + b[None, :] * K
    weights = weight_ptr + feature.to(tl.int64)[:, None] * STORED
    for k0 in tl.range(0, STORED, K_TILE, num_stages=STAGES):
        k = k0 + tl.arange(0, K_TILE)
        x_ok = (b < B)[None, :]
        weight_ok = (feature < OUT)[:, None]
        if STORED % K_TILE != 0:
            x_ok = x_ok & (k < STORED)[:, None]
            weight_ok = weight_ok & (k < STORED)[None, :]
        x = tl.load(x_rows + k[:, None], mask=x_ok, other=0.0)
        weight = tl.load(weights + k[None, :], mask=weight_ok, other=0)
        if BITS == 4:
            high_x = tl.load(x_rows + STORED + k[:, None], mask=x_ok, other=0.0)
            scales = scale_ptr + feature.to(tl.int64)[:, None] * (K // GROUP) + (k // GROUP)[None, :]
            byte = weight.to(tl.int32)
            low = (integer_to_float(byte & 15) - 8.0) * tl.load(scales, mask=weight_ok, other=0.0)
            high = (integer_to_float(byte >> 4) - 8.0) * tl.load(scales + STORED // GROUP, mask=weight_ok, other=0.0)
            sums = tl.dot(low.to(x.dtype), x, sums, input_precision=precision)
            sums = tl.dot(high.to(x.dtype), high_x, sums, input_precision=precision)
        else:
            sums = tl.dot(weight_as(weight, x.dtype), x, sums, input_precision=precision)
    return sums


@triton.jit
def split_k_product(
    x_ptr, weight_ptr,
    b, feature, B,
    OUT: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, K_TILE: tl.constexpr, SPLIT_K: tl.constexpr, STAGES: tl.constexpr,
    IEEE: tl.constexpr,
):  # fmt: skip
    """`tile_product` (no int4) by SPLIT_K warps, each of which sums its own tiles of K."""
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    STEP: tl.constexpr = SPLIT_K * K_TILE
    part = tl.arange(0, SPLIT_K)[:, None] * K_TILE + tl.arange(0, K_TILE)[None, :]
    sums = tl.zeros((SPLIT_K, FEATURES, ROWS), tl.float32)
    for k0 in tl.range(0, K, STEP, num_stages=STAGES):
        k = k0 + part
        x_ok = (b < B)[None, None, :]
        weight_ok = (feature < OUT)[None, :, None]
        if K % STEP != 0:
            x_ok = x_ok & (k < K)[:, :, None]
            weight_ok = weight_ok & (k < K)[:, None, :]
        x = tl.load(x_ptr + (b * K)[None, None, :] + k[:, :, None], mask=x_ok, other=0.0)
        weight = tl.load(weight_ptr + feature.to(tl.int64)[None, :, None] * K + k[:, None, :], mask=weight_ok, other=0)
        sums = tl.dot(weight_as(weight, x.dtype), x, sums, input_precision=precision)
    return tl.sum(sums, 0)


@triton.jit
def megalodon_linear_gemm(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, alpha_ptr, first_ptr, second_ptr, y_ptr,
    B,
    OUT: tl.constexpr, K: tl.constexpr,
    BIAS: tl.constexpr, ALPHA: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, K_TILE: tl.constexpr, SPLIT_K: tl.constexpr, STAGES: tl.constexpr,
    FRAGMENTS: tl.constexpr, IEEE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = first + second + alpha * (x W^T + bias); each of first, second, alpha and bias only if its flag is set.

    In: x (B, K); weight (OUT, K) as stored and its scales; bias, alpha (OUT); first, second (B, OUT). Out: y (B, OUT).
    Grid: (ceil(OUT / FEATURES), ceil(B / ROWS)). The tile of sums (FEATURES, ROWS) float32 stays in registers.
    """
    launch_dependents(PDL)
    first_feature, first_row = tl.program_id(0) * FEATURES, tl.program_id(1) * ROWS
    y = gemm_product(
        x_ptr, weight_ptr, scale_ptr, first_feature, first_row, B,
        OUT, K, BITS, GROUP, ROWS, FEATURES, K_TILE, SPLIT_K, STAGES, FRAGMENTS, IEEE, PDL,
    )  # fmt: skip
    feature, b = first_feature + tl.arange(0, FEATURES), first_row + tl.arange(0, ROWS)
    ok = (b < B)[None, :] & (feature < OUT)[:, None]
    if BIAS:
        y += load_output_features(bias_ptr, feature, OUT)[:, None]
    if ALPHA:
        y *= load_output_features(alpha_ptr, feature, OUT)[:, None]
    at = (b * OUT)[None, :] + feature[:, None]
    if FIRST:
        y += tl.load(first_ptr + at, mask=ok, other=0.0).to(tl.float32)
    if SECOND:
        y += tl.load(second_ptr + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=ok)
