"""The matrix products of a decode step for more rows than a few: tiles for the tensor cores, each weight read once.

The same results as the kernels of `decode.py` that hold rows of a weight in registers and go through the batch one by
one, which is the fastest form for a few rows and costs a latency for each further one. Which form runs is decided by
the grids: the other's is empty.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import inverse_root, silu, start, wait
from .weights import at_rows, split_products, tile_products


@triton.jit
def row_factors(squares_ptr, b, B, eps, D: tl.constexpr, PARTS: tl.constexpr, PARTS_P: tl.constexpr):
    """1 / sqrt(mean of squares + eps) of a tile of rows, from the partial sums of `ema_step`."""
    part = tl.arange(0, PARTS_P)
    ok = (b < B)[:, None] & (part < PARTS)[None, :]
    total = tl.sum(tl.load(squares_ptr + b[:, None] * PARTS + part[None, :], mask=ok, other=0.0), 1)
    return inverse_root(total / D, eps)


@triton.jit
def megalodon_project_tiles(
    x_norm_ptr,
    scaled_ptr,
    squares_ptr,
    position_ptr,
    wz_ptr,
    sz_ptr,
    bz_ptr,
    wr_ptr,
    sr_ptr,
    br_ptr,
    wh_ptr,
    sh_ptr,
    bh_ptr,
    wv_ptr,
    sv_ptr,
    bv_ptr,
    z_ptr,
    r_ptr,
    h_ptr,
    value_ptr,
    B,
    eps,
    D: tl.constexpr,
    Z: tl.constexpr,
    E: tl.constexpr,
    H: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_P: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    IEEE: tl.constexpr,
    PDL: tl.constexpr,
):
    """As `megalodon_project`. `attend` comes next, which fills a GPU: no `start`."""
    tile = tl.program_id(0)
    b = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    E_TILES: tl.constexpr = (E + ROWS - 1) // ROWS
    D_TILES: tl.constexpr = (D + ROWS - 1) // ROWS
    b_ok = (b < B)[:, None]
    wait(PDL)
    if tile < E_TILES:
        row = tile * ROWS + tl.arange(0, ROWS)
        v = tile_products(x_norm_ptr, wv_ptr, sv_ptr, b, row, B, E, D, BITS, GROUP, BATCH, ROWS, COLUMNS, STAGES, IEEE)
        v = silu(v + at_rows(bv_ptr, row, E)[None, :])
        slot = tl.load(position_ptr + b, mask=b < B, other=0) % C
        DV: tl.constexpr = E // H
        stream = (b[:, None] * H + (row // DV)[None, :]).to(tl.int64)
        at = (stream * C + slot[:, None]) * DV + (row % DV)[None, :]
        tl.store(value_ptr + at, v.to(value_ptr.dtype.element_ty), mask=b_ok & (row < E)[None, :])
    elif tile < 2 * E_TILES:
        row = (tile - E_TILES) * ROWS + tl.arange(0, ROWS)
        factor = row_factors(squares_ptr, b, B, eps, D, PARTS, PARTS_P)
        r = tile_products(scaled_ptr, wr_ptr, sr_ptr, b, row, B, E, D, BITS, GROUP, BATCH, ROWS, COLUMNS, STAGES, IEEE)
        r = silu(r * factor[:, None] + at_rows(br_ptr, row, E)[None, :])
        at = b[:, None] * E + row[None, :]
        tl.store(r_ptr + at, r.to(r_ptr.dtype.element_ty), mask=b_ok & (row < E)[None, :])
    elif tile < 2 * E_TILES + D_TILES:
        row = (tile - 2 * E_TILES) * ROWS + tl.arange(0, ROWS)
        factor = row_factors(squares_ptr, b, B, eps, D, PARTS, PARTS_P)
        h = tile_products(scaled_ptr, wh_ptr, sh_ptr, b, row, B, D, D, BITS, GROUP, BATCH, ROWS, COLUMNS, STAGES, IEEE)
        h = h * factor[:, None] + at_rows(bh_ptr, row, D)[None, :]
        tl.store(h_ptr + b[:, None] * D + row[None, :], h, mask=b_ok & (row < D)[None, :])
    else:
        row = (tile - 2 * E_TILES - D_TILES) * ROWS + tl.arange(0, ROWS)
        factor = row_factors(squares_ptr, b, B, eps, D, PARTS, PARTS_P)
        z = tile_products(scaled_ptr, wz_ptr, sz_ptr, b, row, B, Z, D, BITS, GROUP, BATCH, ROWS, COLUMNS, STAGES, IEEE)
        z = z * factor[:, None] + at_rows(bz_ptr, row, Z)[None, :]
        tl.store(z_ptr + b[:, None] * Z + row[None, :], z, mask=b_ok & (row < Z)[None, :])


@triton.jit
def megalodon_linear_tiles(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    alpha_ptr,
    first_ptr,
    second_ptr,
    y_ptr,
    B,
    ROWS_OF: tl.constexpr,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    ALPHA: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    IEEE: tl.constexpr,
    PDL: tl.constexpr,
):
    """As `megalodon_linear`."""
    start(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    ok = (b < B)[:, None] & (row < ROWS_OF)[None, :]
    wait(PDL)
    if PARTS > 1:
        y = split_products(
            x_ptr, weight_ptr, scale_ptr, b, row, B, ROWS_OF, K, BITS, BATCH, ROWS, COLUMNS, PARTS, STAGES, IEEE
        )
    else:
        y = tile_products(
            x_ptr, weight_ptr, scale_ptr, b, row, B, ROWS_OF, K, BITS, GROUP, BATCH, ROWS, COLUMNS, STAGES, IEEE
        )
    if BIAS:
        y += at_rows(bias_ptr, row, ROWS_OF)[None, :]
    if ALPHA:
        y *= at_rows(alpha_ptr, row, ROWS_OF)[None, :]
    at = b[:, None] * ROWS_OF + row[None, :]
    if FIRST:
        y += tl.load(first_ptr + at, mask=ok, other=0.0).to(tl.float32)
    if SECOND:
        y += tl.load(second_ptr + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def megalodon_feed_up_tiles(
    x_ptr,
    w1_ptr,
    s1_ptr,
    b1_ptr,
    w3_ptr,
    s3_ptr,
    b3_ptr,
    hidden_ptr,
    B,
    F: tl.constexpr,
    D: tl.constexpr,
    BIAS: tl.constexpr,
    SWIGLU: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    IEEE: tl.constexpr,
    PDL: tl.constexpr,
):
    """As `megalodon_feed_up`, from x (B, D) normalised already."""
    start(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    wait(PDL)
    y = tile_products(x_ptr, w1_ptr, s1_ptr, b, row, B, F, D, BITS, GROUP, BATCH, ROWS, COLUMNS, STAGES, IEEE)
    if BIAS:
        y += at_rows(b1_ptr, row, F)[None, :]
    y = silu(y)
    if SWIGLU:
        gate = tile_products(x_ptr, w3_ptr, s3_ptr, b, row, B, F, D, BITS, GROUP, BATCH, ROWS, COLUMNS, STAGES, IEEE)
        if BIAS:
            gate += at_rows(b3_ptr, row, F)[None, :]
        y *= gate
    at = b[:, None] * F + row[None, :]
    tl.store(hidden_ptr + at, y.to(hidden_ptr.dtype.element_ty), mask=(b < B)[:, None] & (row < F)[None, :])
