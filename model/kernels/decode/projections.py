"""The four projections of a decode step's attention block in one kernel: z, r, h1 and v.

    m = RMSNorm(EMA output)      z = wz m      r = silu(wr m)      h1 = wh1 m      v = silu(wv x_norm)

RMSNorm's factor is one number a row of the batch, so the kernels multiply the products by it. They compute it from the
partial sums of squares that `ema.py` wrote; no kernel waits for that sum alone. v goes straight to its slot of the
ring.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from ..elementwise import rsqrt, silu
from ..launch import (
    grid_dependency_wait,
    launch,
    launch_dependents,
    launch_dependents_if_small,
    next_power_of_2,
    supports_pdl,
)
from .gemm import batch_tiles, feature_tiles, gemm_launches, gemm_product, use_gemv
from .gemv import gemv_reference, gemv_tile, gemv_tile_sizes, load_weight_tile
from .weights import load_output_features, storage_format, stored_columns


def project_reference(
    x_norm: Tensor,
    scaled: Tensor,
    squares: Tensor,
    position: Tensor,
    wz: Tensor,
    sz: Tensor | None,
    bz: Tensor,
    wr: Tensor,
    sr: Tensor | None,
    br: Tensor,
    wh1: Tensor,
    sh1: Tensor | None,
    bh1: Tensor,
    wv: Tensor,
    sv: Tensor | None,
    bv: Tensor,
    value: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """z (B, Z) and h1 (B, D) float32, r (B, E); v goes into the ring `value` (B, H, C, dv), in place."""
    m = scaled.float() * torch.rsqrt(squares.sum(1, keepdim=True) / scaled.shape[1] + eps)
    z = gemv_reference(m, wz, sz) + bz.float()
    r = F.silu(gemv_reference(m, wr, sr) + br.float())
    h1 = gemv_reference(m, wh1, sh1) + bh1.float()
    v = F.silu(gemv_reference(x_norm, wv, sv) + bv.float())
    rows, slot = torch.arange(value.shape[0]), position % value.shape[2]
    value[rows, :, slot] = v.unflatten(1, value.shape[1::2]).to(value.dtype)
    return z, r.to(x_norm.dtype), h1


@triton_op("megalodon::project", mutates_args={"value"})
def project(
    x_norm: Tensor,
    scaled: Tensor,
    squares: Tensor,
    position: Tensor,
    wz: Tensor,
    sz: Tensor | None,
    bz: Tensor,
    wr: Tensor,
    sr: Tensor | None,
    br: Tensor,
    wh1: Tensor,
    sh1: Tensor | None,
    bh1: Tensor,
    wv: Tensor,
    sv: Tensor | None,
    bv: Tensor,
    value: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """z (B, Z) and h1 (B, D) float32, r (B, E); v goes into the ring `value` (B, H, C, dv), in place.

    x_norm and scaled (B, D), squares (B, partial sums) as `ema_step` returns them; position (B) int64. Each weight
    comes as stored, with its scales or None, and its bias.
    """
    batch, dim = x_norm.shape
    z_dim, value_dim, heads, chunk = wz.shape[0], wv.shape[0], value.shape[1], value.shape[2]
    z = x_norm.new_empty(batch, z_dim, dtype=torch.float32)
    h = x_norm.new_empty(batch, dim, dtype=torch.float32)
    r = x_norm.new_empty(batch, value_dim)
    weights = [x_norm if t is None else t for t in (wz, sz, bz, wr, sr, br, wh1, sh1, bh1, wv, sv, bv)]
    tensors = (x_norm, scaled, squares, position, *weights, z, r, h, value, batch, eps)
    sizes = {"D": dim, "Z": z_dim, "E": value_dim, "H": heads, "C": chunk, "PARTIALS": squares.shape[1]}
    sizes |= {"PARTIALS_P": next_power_of_2(squares.shape[1]), "PDL": supports_pdl(x_norm)}
    sizes |= storage_format(wz, sz, dim)
    outputs = (value_dim, value_dim, dim, z_dim)
    shape = gemv_tile_sizes(wz, dim, 4, 2)
    tiles = sum(feature_tiles(n, shape) for n in outputs)
    width = next_power_of_2(stored_columns(dim, sizes))
    tiles *= use_gemv(batch, x_norm, wz, sz)
    launch(megalodon_project_gemv, (tiles,))(*tensors, **sizes, WIDTH=width, **shape)
    for use, shape in gemm_launches(batch, sum(outputs), x_norm, wz, sz):
        tiles = sum(feature_tiles(n, shape) for n in outputs)
        launch(megalodon_project_gemm, (tiles * use, batch_tiles(batch, shape)))(*tensors, **sizes, **shape)
    return z, r, h


@triton.jit
def rms_norm_gemv(
    weight, x_ptr, squares_ptr, b, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    PARTIALS: tl.constexpr, PARTIALS_P: tl.constexpr,
):  # fmt: skip
    """A weight tile in registers times RMSNorm(row b): x (B, D) in memory is already times the norm's scale."""
    partial = tl.arange(0, PARTIALS_P)
    squares = tl.load(squares_ptr + b * PARTIALS + partial, mask=partial < PARTIALS, other=0.0)
    y = gemv_tile(weight, x_ptr + b * D, 0, D, WIDTH, BITS, GROUP)
    return y * rsqrt(tl.sum(squares, 0) / D, eps)


@triton.jit
def megalodon_project_gemv(
    x_norm_ptr, scaled_ptr, squares_ptr, position_ptr,
    wz_ptr, sz_ptr, bz_ptr, wr_ptr, sr_ptr, br_ptr, wh_ptr, sh_ptr, bh_ptr, wv_ptr, sv_ptr, bv_ptr,
    z_ptr, r_ptr, h_ptr, value_ptr,
    B, eps,
    D: tl.constexpr, Z: tl.constexpr, E: tl.constexpr, H: tl.constexpr, C: tl.constexpr,
    PARTIALS: tl.constexpr, PARTIALS_P: tl.constexpr,
    WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, FEATURES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """FEATURES output features of one of wv, wr, wh1, wz, for every row of the batch.

    In: x_norm, scaled (B, D); squares (B, PARTIALS) float32; position (B) int64; four weights with scales and biases.
    Out: z (B, Z), h (B, D) float32; r (B, E); v into the ring (B, H, C, dv) at slot position % C.
    Grid: the sum over the four weights of ceil(features / FEATURES), in the order v, r, h1, z. The program's tile of
    its weight and its bias stay in registers over the loop of rows.
    """
    launch_dependents(PDL)
    tile = tl.program_id(0)
    E_TILES: tl.constexpr = (E + FEATURES - 1) // FEATURES
    D_TILES: tl.constexpr = (D + FEATURES - 1) // FEATURES
    if tile < E_TILES:
        feature = tile * FEATURES + tl.arange(0, FEATURES)
        weight = load_weight_tile(wv_ptr, sv_ptr, feature, 0, E, D, WIDTH, BITS, GROUP)
        bias = load_output_features(bv_ptr, feature, E)
        grid_dependency_wait(PDL)
        for b in range(B):
            slot = tl.load(position_ptr + b) % C
            v = silu(gemv_tile(weight, x_norm_ptr + b * D, 0, D, WIDTH, BITS, GROUP) + bias)
            DV: tl.constexpr = E // H
            at = ((b * H + feature // DV).to(tl.int64) * C + slot) * DV + feature % DV
            tl.store(value_ptr + at, v.to(value_ptr.dtype.element_ty), mask=feature < E)
    elif tile < 2 * E_TILES:
        feature = (tile - E_TILES) * FEATURES + tl.arange(0, FEATURES)
        weight = load_weight_tile(wr_ptr, sr_ptr, feature, 0, E, D, WIDTH, BITS, GROUP)
        bias = load_output_features(br_ptr, feature, E)
        grid_dependency_wait(PDL)
        for b in range(B):
            r = rms_norm_gemv(weight, scaled_ptr, squares_ptr, b, eps, D, WIDTH, BITS, GROUP, PARTIALS, PARTIALS_P)
            r = silu(r + bias)
            tl.store(r_ptr + b * E + feature, r.to(r_ptr.dtype.element_ty), mask=feature < E)
    elif tile < 2 * E_TILES + D_TILES:
        feature = (tile - 2 * E_TILES) * FEATURES + tl.arange(0, FEATURES)
        weight = load_weight_tile(wh_ptr, sh_ptr, feature, 0, D, D, WIDTH, BITS, GROUP)
        bias = load_output_features(bh_ptr, feature, D)
        grid_dependency_wait(PDL)
        for b in range(B):
            h = rms_norm_gemv(weight, scaled_ptr, squares_ptr, b, eps, D, WIDTH, BITS, GROUP, PARTIALS, PARTIALS_P)
            tl.store(h_ptr + b * D + feature, h + bias, mask=feature < D)
    else:
        feature = (tile - 2 * E_TILES - D_TILES) * FEATURES + tl.arange(0, FEATURES)
        weight = load_weight_tile(wz_ptr, sz_ptr, feature, 0, Z, D, WIDTH, BITS, GROUP)
        bias = load_output_features(bz_ptr, feature, Z)
        grid_dependency_wait(PDL)
        for b in range(B):
            z = rms_norm_gemv(weight, scaled_ptr, squares_ptr, b, eps, D, WIDTH, BITS, GROUP, PARTIALS, PARTIALS_P)
            tl.store(z_ptr + b * Z + feature, z + bias, mask=feature < Z)


@triton.jit
def rms_factors(squares_ptr, b, B, eps, D: tl.constexpr, PARTIALS: tl.constexpr, PARTIALS_P: tl.constexpr):
    """1 / sqrt(mean square + eps) of rows b (ROWS) of the batch, from squares (B, PARTIALS)."""
    partial = tl.arange(0, PARTIALS_P)
    ok = (b < B)[:, None] & (partial < PARTIALS)[None, :]
    total = tl.sum(tl.load(squares_ptr + b[:, None] * PARTIALS + partial[None, :], mask=ok, other=0.0), 1)
    return rsqrt(total / D, eps)


@triton.jit
def rms_norm_gemm(
    weight_ptr, scale_ptr, bias_ptr, x_ptr, squares_ptr,
    first_feature, first_row, B, eps,
    OUT: tl.constexpr, D: tl.constexpr, PARTIALS: tl.constexpr, PARTIALS_P: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, K_TILE: tl.constexpr, SPLIT_K: tl.constexpr, STAGES: tl.constexpr,
    FRAGMENTS: tl.constexpr, IEEE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """RMSNorm(ROWS rows from first_row on) times a weight (OUT, D), plus bias: (FEATURES, ROWS) float32."""
    y = gemm_product(
        x_ptr, weight_ptr, scale_ptr, first_feature, first_row, B,
        OUT, D, BITS, GROUP, ROWS, FEATURES, K_TILE, SPLIT_K, STAGES, FRAGMENTS, IEEE, PDL,
    )  # fmt: skip
    factor = rms_factors(squares_ptr, first_row + tl.arange(0, ROWS), B, eps, D, PARTIALS, PARTIALS_P)
    bias = load_output_features(bias_ptr, first_feature + tl.arange(0, FEATURES), OUT)
    return y * factor[None, :] + bias[:, None]


@triton.jit
def megalodon_project_gemm(
    x_norm_ptr, scaled_ptr, squares_ptr, position_ptr,
    wz_ptr, sz_ptr, bz_ptr, wr_ptr, sr_ptr, br_ptr, wh_ptr, sh_ptr, bh_ptr, wv_ptr, sv_ptr, bv_ptr,
    z_ptr, r_ptr, h_ptr, value_ptr,
    B, eps,
    D: tl.constexpr, Z: tl.constexpr, E: tl.constexpr, H: tl.constexpr, C: tl.constexpr,
    PARTIALS: tl.constexpr, PARTIALS_P: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, K_TILE: tl.constexpr, SPLIT_K: tl.constexpr, STAGES: tl.constexpr,
    FRAGMENTS: tl.constexpr, IEEE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the batch times FEATURES output features of one of wv, wr, wh1, wz, on the tensor cores.

    In and out: the tensors of `megalodon_project_gemv`. Grid: (the sum over the four weights of ceil(features /
    FEATURES), in the order v, r, h1, z; ceil(B / ROWS)). The tile of sums stays in registers.
    The next kernel is `megalodon_attend`, which fills a GPU from some rows on.
    """
    launch_dependents_if_small(B, PDL)
    tile = tl.program_id(0)
    first_row = tl.program_id(1) * ROWS
    b = first_row + tl.arange(0, ROWS)
    E_TILES: tl.constexpr = (E + FEATURES - 1) // FEATURES
    D_TILES: tl.constexpr = (D + FEATURES - 1) // FEATURES
    b_ok = (b < B)[None, :]
    if tile < E_TILES:
        first = tile * FEATURES
        v = gemm_product(
            x_norm_ptr, wv_ptr, sv_ptr, first, first_row, B,
            E, D, BITS, GROUP, ROWS, FEATURES, K_TILE, SPLIT_K, STAGES, FRAGMENTS, IEEE, PDL,
        )  # fmt: skip
        feature = first + tl.arange(0, FEATURES)
        v = silu(v + load_output_features(bv_ptr, feature, E)[:, None])
        slot = tl.load(position_ptr + b, mask=b < B, other=0) % C
        DV: tl.constexpr = E // H
        head = (b[None, :] * H + (feature // DV)[:, None]).to(tl.int64)
        at = (head * C + slot[None, :]) * DV + (feature % DV)[:, None]
        tl.store(value_ptr + at, v.to(value_ptr.dtype.element_ty), mask=b_ok & (feature < E)[:, None])
    elif tile < 2 * E_TILES:
        first = (tile - E_TILES) * FEATURES
        r = silu(rms_norm_gemm(
            wr_ptr, sr_ptr, br_ptr, scaled_ptr, squares_ptr, first, first_row, B, eps, E, D, PARTIALS, PARTIALS_P,
            BITS, GROUP, ROWS, FEATURES, K_TILE, SPLIT_K, STAGES, FRAGMENTS, IEEE, PDL,
        ))  # fmt: skip
        feature = first + tl.arange(0, FEATURES)
        at = (b * E)[None, :] + feature[:, None]
        tl.store(r_ptr + at, r.to(r_ptr.dtype.element_ty), mask=b_ok & (feature < E)[:, None])
    elif tile < 2 * E_TILES + D_TILES:
        first = (tile - 2 * E_TILES) * FEATURES
        h = rms_norm_gemm(
            wh_ptr, sh_ptr, bh_ptr, scaled_ptr, squares_ptr, first, first_row, B, eps, D, D, PARTIALS, PARTIALS_P,
            BITS, GROUP, ROWS, FEATURES, K_TILE, SPLIT_K, STAGES, FRAGMENTS, IEEE, PDL,
        )  # fmt: skip
        feature = first + tl.arange(0, FEATURES)
        tl.store(h_ptr + (b * D)[None, :] + feature[:, None], h, mask=b_ok & (feature < D)[:, None])
    else:
        first = (tile - 2 * E_TILES - D_TILES) * FEATURES
        z = rms_norm_gemm(
            wz_ptr, sz_ptr, bz_ptr, scaled_ptr, squares_ptr, first, first_row, B, eps, Z, D, PARTIALS, PARTIALS_P,
            BITS, GROUP, ROWS, FEATURES, K_TILE, SPLIT_K, STAGES, FRAGMENTS, IEEE, PDL,
        )  # fmt: skip
        feature = first + tl.arange(0, FEATURES)
        tl.store(z_ptr + (b * Z)[None, :] + feature[:, None], z, mask=b_ok & (feature < Z)[:, None])
