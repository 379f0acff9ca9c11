"""Weights of linear layers as the kernels read them: floats, or integers and scales as `QuantizedLinear` stores them.

BITS is 0 for floats, 8 for int8 with a scale a row, 4 for int4 with a scale for GROUP features. A byte of int4 has
those of features j and j + K/2, so the bytes of a row meet both halves of the vector, and nothing is interleaved.
"""

from __future__ import annotations

import triton
import triton.language as tl

_MAGIC = tl.constexpr(0x4B000000)  # the float32 2^23, whose last bits count ones
_ZERO = tl.constexpr(2.0**23)


@triton.jit
def float_of(integer):
    """A small integer >= 0 as float32, by two cheap instructions: conversions have a quarter of their rate."""
    return (integer | _MAGIC).to(tl.float32, bitcast=True) - _ZERO


@triton.jit
def float_of_weight(weight):
    """Floats and int8 as float32."""
    if weight.dtype == tl.int8:
        return float_of((weight.to(tl.int32) & 255) ^ 128) - 128.0
    else:
        return weight.to(tl.float32)


@triton.jit
def columns_of(first, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
    """WIDTH columns from `first` on: a row, or for int4, whose columns are bytes, (groups, GROUP)."""
    if BITS == 4:
        group = tl.arange(0, WIDTH // GROUP)
        return first + group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    else:
        return first + tl.arange(0, WIDTH)


@triton.jit
def weight_rows(
    weight_ptr,
    scale_ptr,
    row,
    first,
    ROWS_OF: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Rows of a weight (ROWS_OF, K), WIDTH columns from `first` on: a tile that stays in registers, and its scales."""
    k = columns_of(first, WIDTH, BITS, GROUP)
    long_row, row_ok = row.to(tl.int64), row < ROWS_OF
    if BITS == 4:
        HALF: tl.constexpr = K // 2
        ok = row_ok[:, None, None] & (k < HALF)[None, :, :]
        weight = tl.load(weight_ptr + long_row[:, None, None] * HALF + k[None, :, :], mask=ok, other=0)
        group = first // GROUP + tl.arange(0, WIDTH // GROUP)
        group_ok = row_ok[:, None] & (group < HALF // GROUP)[None, :]
        scales = scale_ptr + long_row[:, None] * (K // GROUP) + group[None, :]
        low = tl.load(scales, mask=group_ok, other=0.0)
        high = tl.load(scales + HALF // GROUP, mask=group_ok, other=0.0)
    else:
        ok = row_ok[:, None] & (k < K)[None, :]
        weight = tl.load(weight_ptr + long_row[:, None] * K + k[None, :], mask=ok, other=0)
        low = at_rows(scale_ptr, row, ROWS_OF) if BITS == 8 else tl.full(row.shape, 1.0, tl.float32)
        high = low
    return weight, low, high


@triton.jit
def spread(y):
    """A sum over columns (rows), of which every thread holds all, each row to the threads that store it.

    By choices in registers. Left to the compiler, sums of more than two rows go through shared memory, where all
    threads write to one place, and take twice as many barriers.
    """
    row = tl.arange(0, y.shape[0])
    out = tl.zeros(y.shape, tl.float32)
    for i in tl.static_range(y.shape[0]):
        out = tl.where(row == i, tl.sum(tl.where(row == i, y, 0.0), 0), out)
    return out


@triton.jit
def products(tile, x_ptr, first, K: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
    """A tile of `weight_rows` times its columns of one vector (K), summed in float32."""
    k = columns_of(first, WIDTH, BITS, GROUP)
    if BITS == 4:
        HALF: tl.constexpr = K // 2
        low_x = tl.load(x_ptr + k, mask=k < HALF, other=0.0).to(tl.float32)
        high_x = tl.load(x_ptr + HALF + k, mask=k < HALF, other=0.0).to(tl.float32)
        byte = tile[0].to(tl.int32)
        low = tl.sum((float_of(byte & 15) - 8.0) * low_x[None, :, :], 2)
        high = tl.sum((float_of(byte >> 4) - 8.0) * high_x[None, :, :], 2)
        return tl.sum(low * tile[1] + high * tile[2], 1)
    else:
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        return row_products(tile, x)


@triton.jit
def row_products(tile, x):
    """A tile of floats or int8 times a vector of all its columns, float32."""
    y = tl.sum(float_of_weight(tile[0]) * x[None, :], 1)
    if y.shape[0] > 2:
        y = spread(y)
    return y * tile[1]


@triton.jit
def at_rows(vector_ptr, row, ROWS_OF: tl.constexpr):
    """A vector (ROWS_OF), such as a bias or int8's scales, at some rows, float32."""
    return tl.load(vector_ptr + row, mask=row < ROWS_OF, other=0.0).to(tl.float32)


@triton.jit
def tile_products(
    x_ptr,
    weight_ptr,
    scale_ptr,
    b,
    row,
    B,
    ROWS_OF: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    IEEE: tl.constexpr,
):
    """x (B, K) at rows b times a weight (ROWS_OF, K) at rows `row` on the tensor cores: (BATCH, ROWS) float32."""
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    STORED: tl.constexpr = K // 2 if BITS == 4 else K  # columns, of bytes for int4
    sums = tl.zeros((BATCH, ROWS), tl.float32)
    x_rows = x_ptr + b[:, None] * K
    weights = weight_ptr + row.to(tl.int64)[None, :] * STORED
    for k0 in tl.range(0, STORED, COLUMNS, num_stages=STAGES):
        k = k0 + tl.arange(0, COLUMNS)
        x_ok = (b < B)[:, None]
        weight_ok = (row < ROWS_OF)[None, :]
        if STORED % COLUMNS != 0:
            x_ok = x_ok & (k < STORED)[None, :]
            weight_ok = weight_ok & (k < STORED)[:, None]
        x = tl.load(x_rows + k[None, :], mask=x_ok, other=0.0)
        weight = tl.load(weights + k[:, None], mask=weight_ok, other=0)
        if BITS == 4:
            high_x = tl.load(x_rows + STORED + k[None, :], mask=x_ok, other=0.0)
            scales = scale_ptr + row.to(tl.int64)[None, :] * (K // GROUP) + (k // GROUP)[:, None]
            byte = weight.to(tl.int32)
            low = (float_of(byte & 15) - 8.0) * tl.load(scales, mask=weight_ok, other=0.0)
            high = (float_of(byte >> 4) - 8.0) * tl.load(scales + STORED // GROUP, mask=weight_ok, other=0.0)
            sums = tl.dot(x, low.to(x.dtype), sums, input_precision=precision)
            sums = tl.dot(high_x, high.to(x.dtype), sums, input_precision=precision)
        else:
            sums = tl.dot(x, weight.to(x.dtype), sums, input_precision=precision)
    if BITS == 8:
        sums *= at_rows(scale_ptr, row, ROWS_OF)[None, :]
    return sums


@triton.jit
def split_products(
    x_ptr,
    weight_ptr,
    scale_ptr,
    b,
    row,
    B,
    ROWS_OF: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    IEEE: tl.constexpr,
):
    """As `tile_products` (no int4) by PARTS warps that have a part of K each.

    For weights of few rows: their tiles are few, and one that goes through all of K takes as long as its steps.
    """
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    PART: tl.constexpr = (K + PARTS * COLUMNS - 1) // (PARTS * COLUMNS) * COLUMNS
    first = tl.arange(0, PARTS) * PART
    sums = tl.zeros((PARTS, BATCH, ROWS), tl.float32)
    for k0 in tl.range(0, PART, COLUMNS, num_stages=STAGES):
        k = first[:, None] + k0 + tl.arange(0, COLUMNS)[None, :]
        x_ok = (b < B)[None, :, None]
        weight_ok = (row < ROWS_OF)[None, None, :]
        if PART * PARTS != K:
            x_ok = x_ok & (k < K)[:, None, :]
            weight_ok = weight_ok & (k < K)[:, :, None]
        x = tl.load(x_ptr + (b * K)[None, :, None] + k[:, None, :], mask=x_ok, other=0.0)
        at = row.to(tl.int64)[None, None, :] * K + k[:, :, None]
        weight = tl.load(weight_ptr + at, mask=weight_ok, other=0)
        sums = tl.dot(x, weight.to(x.dtype), sums, input_precision=precision)
    y = tl.sum(sums, 0)
    if BITS == 8:
        y *= at_rows(scale_ptr, row, ROWS_OF)[None, :]
    return y
