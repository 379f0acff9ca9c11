"""Kernels of one decode step of a layer: each weight and each valid cache slot is read once.

    ema_step   TimestepNorm, complex EMA, and what RMSNorm needs     x, states -> x_norm, scaled, squares
    project    z, r, h1 from the RMSNorm's output, v from x_norm     v goes to its slot of the ring
    (ring.py)  attention over the ring, times r                      -> gated
    linear     h = h1 + wh2 gated + x; later x + alpha fc2 hidden; the head
    feed_up    LayerNorm and fc1 (fc3), silu                         -> hidden
    (ends.py)  before the first layer, and behind the last one

RMSNorm's factor is one number a row: `project` multiplies its products by it, so no kernel waits for the sum of squares
alone. What a program reads after its wait it asks for before its first sum: a sum over several warps is a barrier that
no load is moved across, and each further trip to memory shows in the step's time. Rows of a batch never meet, and every
sum has one order: a row's result does not depend on its company. Letters as in the model's comments; a suffix _P is a
size padded to a power of two, which tiles need.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import inverse_root, silu, start, wait
from .norms import layer_norm, scale_and_shift, timestep_norm
from .weights import at_rows, products, row_products, weight_rows


@triton.jit
def megalodon_ema_step(
    x_ptr,
    position_ptr,
    mean_ptr,
    var_ptr,
    state_ptr,
    weight_ptr,
    bias_ptr,
    p_ptr,
    q_ptr,
    gamma_ptr,
    omega_ptr,
    scale_ptr,
    x_norm_ptr,
    scaled_ptr,
    squares_ptr,
    eps,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    N_P: tl.constexpr,
    HF: tl.constexpr,
    AFFINE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row, GROUPS groups of GROUP channels: x (B, D) -> x_norm, EMA output times RMSNorm's scale, squares' sum."""
    start(PDL)
    D: tl.constexpr = G * GROUP
    CHANNELS: tl.constexpr = GROUPS * GROUP_P
    b = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    inside = tl.arange(0, GROUP_P)
    ok = (group < G)[:, None] & (inside < GROUP)[None, :]
    channel = group[:, None] * GROUP + inside[None, :]
    flat = tl.reshape(channel, (CHANNELS,))
    flat_ok = tl.reshape(ok, (CHANNELS,))

    # Constants and the state, which no kernel of this step writes before this one.
    weight = tl.load(weight_ptr + channel, mask=ok, other=0.0).to(tl.float32) + 1.0
    bias = tl.load(bias_ptr + channel, mask=ok, other=0.0).to(tl.float32)
    mode = tl.arange(0, N_P)
    mode_ok = flat_ok[:, None] & (mode < N)[None, :]
    p = tl.load(p_ptr + flat[:, None] * N + mode[None, :], mask=mode_ok, other=0.0)
    pair = tl.arange(0, 2 * N_P)
    pairs = flat[:, None] * (2 * N) + pair[None, :]
    pairs_ok = flat_ok[:, None] & (pair < 2 * N)[None, :]
    q = tl.load(q_ptr + pairs, mask=pairs_ok, other=0.0)
    gamma = tl.load(gamma_ptr + pairs, mask=pairs_ok, other=0.0)
    omega = tl.load(omega_ptr + flat, mask=flat_ok, other=0.0)
    states = state_ptr + b * (D * 2 * N) + pairs
    state = tl.load(states, mask=pairs_ok, other=0.0)
    q_re, q_im = tl.split(tl.reshape(q, (CHANNELS, N_P, 2)))
    g_re, g_im = tl.split(tl.reshape(gamma, (CHANNELS, N_P, 2)))
    re, im = tl.split(tl.reshape(state, (CHANNELS, N_P, 2)))
    scale = tl.full((CHANNELS,), 1.0, tl.float32)
    if AFFINE:
        scale += tl.load(scale_ptr + flat, mask=flat_ok, other=0.0).to(tl.float32)

    wait(PDL)
    normed, _ = timestep_norm(
        x_ptr, position_ptr, mean_ptr, var_ptr, b, group, channel, ok, weight, bias, eps, G, GROUP, HF
    )
    x_norm = tl.reshape(normed, (CHANNELS,)).to(x_norm_ptr.dtype.element_ty)
    tl.store(x_norm_ptr + b * D + flat, x_norm, mask=flat_ok)

    u = x_norm.to(tl.float32)
    new_re = q_re * re - q_im * im + p * u[:, None]
    new_im = q_re * im + q_im * re
    tl.store(states, tl.reshape(tl.join(new_re, new_im), (CHANNELS, 2 * N_P)), mask=pairs_ok)
    y = tl.sum(g_re * new_re - g_im * new_im, 1) + omega * u
    y = tl.where(flat_ok, y, 0.0)
    tl.store(scaled_ptr + b * D + flat, (y * scale).to(scaled_ptr.dtype.element_ty), mask=flat_ok)
    tl.store(squares_ptr + b * tl.num_programs(1) + tl.program_id(1), tl.sum(y * y, 0))


@triton.jit
def root_mean_square_products(
    weight,
    x_ptr,
    squares_ptr,
    b,
    eps,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_P: tl.constexpr,
):
    """A weight (rows, D) times row b of the RMSNorm's output: x (B, D), scaled by `ema_step`, times a factor."""
    part = tl.arange(0, PARTS_P)
    squares = tl.load(squares_ptr + b * PARTS + part, mask=part < PARTS, other=0.0)
    y = products(weight, x_ptr + b * D, 0, D, WIDTH, BITS, GROUP)
    return y * inverse_root(tl.sum(squares, 0) / D, eps)


@triton.jit
def megalodon_project(
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
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """ROWS rows of one of wz, wr, wh1 (times the RMSNorm's output) or wv (times x_norm), for every row of the batch.

    -> z (B, Z) and h (B, D) float32, r = silu (B, E), v = silu into the slot of the ring (B, H, C, dv).
    """
    start(PDL)
    tile = tl.program_id(0)
    E_TILES: tl.constexpr = (E + ROWS - 1) // ROWS
    D_TILES: tl.constexpr = (D + ROWS - 1) // ROWS
    if tile < E_TILES:
        row = tile * ROWS + tl.arange(0, ROWS)
        weight = weight_rows(wv_ptr, sv_ptr, row, 0, E, D, WIDTH, BITS, GROUP)
        bias = at_rows(bv_ptr, row, E)
        wait(PDL)
        for b in range(B):
            slot = tl.load(position_ptr + b) % C
            v = silu(products(weight, x_norm_ptr + b * D, 0, D, WIDTH, BITS, GROUP) + bias)
            DV: tl.constexpr = E // H
            at = ((b * H + row // DV).to(tl.int64) * C + slot) * DV + row % DV
            tl.store(value_ptr + at, v.to(value_ptr.dtype.element_ty), mask=row < E)
    elif tile < 2 * E_TILES:
        row = (tile - E_TILES) * ROWS + tl.arange(0, ROWS)
        weight = weight_rows(wr_ptr, sr_ptr, row, 0, E, D, WIDTH, BITS, GROUP)
        bias = at_rows(br_ptr, row, E)
        wait(PDL)
        for b in range(B):
            r = root_mean_square_products(
                weight, scaled_ptr, squares_ptr, b, eps, D, WIDTH, BITS, GROUP, PARTS, PARTS_P
            )
            r = silu(r + bias)
            tl.store(r_ptr + b * E + row, r.to(r_ptr.dtype.element_ty), mask=row < E)
    elif tile < 2 * E_TILES + D_TILES:
        row = (tile - 2 * E_TILES) * ROWS + tl.arange(0, ROWS)
        weight = weight_rows(wh_ptr, sh_ptr, row, 0, D, D, WIDTH, BITS, GROUP)
        bias = at_rows(bh_ptr, row, D)
        wait(PDL)
        for b in range(B):
            h = root_mean_square_products(
                weight, scaled_ptr, squares_ptr, b, eps, D, WIDTH, BITS, GROUP, PARTS, PARTS_P
            )
            tl.store(h_ptr + b * D + row, h + bias, mask=row < D)
    else:
        row = (tile - 2 * E_TILES - D_TILES) * ROWS + tl.arange(0, ROWS)
        weight = weight_rows(wz_ptr, sz_ptr, row, 0, Z, D, WIDTH, BITS, GROUP)
        bias = at_rows(bz_ptr, row, Z)
        wait(PDL)
        for b in range(B):
            z = root_mean_square_products(
                weight, scaled_ptr, squares_ptr, b, eps, D, WIDTH, BITS, GROUP, PARTS, PARTS_P
            )
            tl.store(z_ptr + b * Z + row, z + bias, mask=row < Z)


@triton.jit
def megalodon_linear(
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
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL_P: tl.constexpr,
    ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    ALPHA: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    PDL: tl.constexpr,
):
    """y (B, ROWS_OF) = first + second + alpha * (x W^T + bias), what there is of it, summed in float32.

    The columns are HEAD, a power of two, and a tail that is padded: less is masked than in one tile of all.
    """
    start(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok = row < ROWS_OF
    weight = weight_rows(weight_ptr, scale_ptr, row, 0, ROWS_OF, K, HEAD, BITS, GROUP)
    if TAIL_P > 0:
        tail = weight_rows(weight_ptr, scale_ptr, row, HEAD, ROWS_OF, K, TAIL_P, BITS, GROUP)
    bias = tl.zeros((ROWS,), tl.float32)
    alpha = tl.full((ROWS,), 1.0, tl.float32)
    if BIAS:
        bias += at_rows(bias_ptr, row, ROWS_OF)
    if ALPHA:
        alpha = at_rows(alpha_ptr, row, ROWS_OF)
    wait(PDL)
    for b in range(B):
        at = b * ROWS_OF + row
        rest = tl.zeros((ROWS,), tl.float32)
        if FIRST:
            rest += tl.load(first_ptr + at, mask=ok, other=0.0).to(tl.float32)
        if SECOND:
            rest += tl.load(second_ptr + at, mask=ok, other=0.0).to(tl.float32)
        y = products(weight, x_ptr + b * K, 0, K, HEAD, BITS, GROUP) + bias
        if TAIL_P > 0:
            y += products(tail, x_ptr + b * K, HEAD, K, TAIL_P, BITS, GROUP)
        y = y * alpha + rest
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def megalodon_feed_up(
    h_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    w1_ptr,
    s1_ptr,
    b1_ptr,
    w3_ptr,
    s3_ptr,
    b3_ptr,
    hidden_ptr,
    B,
    eps,
    F: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    AFFINE: tl.constexpr,
    BIAS: tl.constexpr,
    SWIGLU: tl.constexpr,
    PDL: tl.constexpr,
):
    """hidden (B, F) = silu(fc1(norm(h))), times fc3(norm(h)) with swiglu; for int4 h (B, D) is normed already."""
    start(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dtype = hidden_ptr.dtype.element_ty
    w1 = weight_rows(w1_ptr, s1_ptr, row, 0, F, D, WIDTH, BITS, GROUP)
    b1 = tl.zeros((ROWS,), tl.float32)
    b3 = tl.zeros((ROWS,), tl.float32)
    if BIAS:
        b1 += at_rows(b1_ptr, row, F)
    if SWIGLU:
        w3 = weight_rows(w3_ptr, s3_ptr, row, 0, F, D, WIDTH, BITS, GROUP)
        if BIAS:
            b3 += at_rows(b3_ptr, row, F)
    if BITS != 4:
        k = tl.arange(0, WIDTH)
        scale, shift = scale_and_shift(norm_weight_ptr, norm_bias_ptr, k, D, AFFINE)
    wait(PDL)
    for b in range(B):
        if BITS == 4:
            y = products(w1, h_ptr + b * D, 0, D, WIDTH, BITS, GROUP)
            if SWIGLU:
                gate = products(w3, h_ptr + b * D, 0, D, WIDTH, BITS, GROUP)
        else:
            x = tl.load(h_ptr + b * D + k, mask=k < D, other=0.0)
            x = layer_norm(x, k, eps, scale, shift, D).to(dtype).to(tl.float32)
            y = row_products(w1, x)
            if SWIGLU:
                gate = row_products(w3, x)
        y = silu(y + b1)
        if SWIGLU:
            y *= gate + b3
        tl.store(hidden_ptr + b * F + row, y.to(dtype), mask=row < F)
