"""Kernels of a prefill's attention: new tokens over the keys of their chunk, those in the ring and those that are new.

    rotate   q and k of every new token from z
    scores   tiles of exp(q k - the tile's largest score of each query), with that maximum and their sum
    softmax  the tiles brought to one maximum and normalised, in place
    weigh    their product with v, times silu(r)
    store    the last tokens' keys and values into the ring

The keys of a row are numbered by u: 0 .. offset - 1 are the ring's valid slots, offset + i is new token i. A query at u
attends from the start of its chunk, u // C * C, to u. Head sizes of keys and values differ (dz, dv), and dv may be too
large for one program, so scores are computed once and read by every part of dv. Those take them straight from shared
memory to the tensor cores: normalised by each of them, in registers, they took twice the time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import inverse_root, silu, start, wait
from .ring import rotated, turn_of


@triton.jit
def megalodon_rotate(
    z_ptr,
    gamma_ptr,
    beta_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    L,
    eps,
    H: tl.constexpr,
    HALF: tl.constexpr,
    HALF_P: tl.constexpr,
    PDL: tl.constexpr,
):
    """z (B, L, Z), cos and sin (B, L, dz/2) -> q, k (B, H, L, dz), one token and head a program."""
    start(PDL)
    token = tl.program_id(0)
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    half = tl.arange(0, HALF_P)
    ok = half < HALF
    at = head * (2 * HALF) + half
    wait(PDL)
    row = (b * L + token) * (2 * HALF * H)
    lo = tl.load(z_ptr + row + at, mask=ok, other=0.0).to(tl.float32)
    hi = tl.load(z_ptr + row + at + HALF, mask=ok, other=0.0).to(tl.float32)
    factor = inverse_root(tl.sum(lo * lo + hi * hi, 0) / (2 * HALF), eps)
    cos = tl.load(cos_ptr + (b * L + token) * HALF + half, mask=ok, other=0.0)
    sin = tl.load(sin_ptr + (b * L + token) * HALF + half, mask=ok, other=0.0)
    Z: tl.constexpr = 2 * HALF * H
    q_lo, q_hi = rotated(lo * factor, hi * factor, turn_of(gamma_ptr, beta_ptr, at, ok, HALF), cos, sin)
    k_lo, k_hi = rotated(lo * factor, hi * factor, turn_of(gamma_ptr + Z, beta_ptr + Z, at, ok, HALF), cos, sin)
    out = ((b * H + head) * L + token) * (2 * HALF) + half
    dtype = q_ptr.dtype.element_ty
    tl.store(q_ptr + out, q_lo.to(dtype), mask=ok)
    tl.store(q_ptr + out + HALF, q_hi.to(dtype), mask=ok)
    tl.store(k_ptr + out, k_lo.to(dtype), mask=ok)
    tl.store(k_ptr + out + HALF, k_hi.to(dtype), mask=ok)


@triton.jit
def key_rows(u, offset, L, ring_ptr, new_ptr, ring_stride: tl.constexpr, new_stride: tl.constexpr):
    """Pointers to the rows of keys (or values) number u, in the ring or among the new ones, and which exist.

    A choice between pointers would hide from the compiler that rows are aligned, and it would load them number by
    number. So both are offsets from the ring; tensors begin at multiples of 16 bytes.
    """
    size: tl.constexpr = ring_ptr.dtype.element_ty.primitive_bitwidth // 8
    apart = tl.multiple_of((new_ptr.to(tl.int64) - ring_ptr.to(tl.int64)) // size, 16 // size)
    new = (u >= offset).to(tl.int64)
    rows = ring_ptr + (
        u.to(tl.int64) * ring_stride + new * (apart - offset * new_stride + u * (new_stride - ring_stride))
    )
    return rows, u - offset < L


@triton.jit
def reach(offset, row_tile, L, C: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """For a tile of queries: the number of its first key, and of tiles of keys from there on."""
    first = offset + row_tile * QUERIES
    chunk = first // C * C
    tiles = (first + QUERIES - 1 - chunk) // KEYS + 1
    return chunk, tl.minimum(tiles, tl.cdiv(offset + L - chunk, KEYS))


@triton.jit
def megalodon_scores(
    q_ptr,
    k_ptr,
    ring_ptr,
    position_ptr,
    weights_ptr,
    peaks_ptr,
    totals_ptr,
    L,
    H: tl.constexpr,
    C: tl.constexpr,
    DZ: tl.constexpr,
    DZ_P: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    TILES: tl.constexpr,
    IEEE: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of queries and keys -> weights (B, H, L, TILES KEYS); peaks and totals (B, H, TILES, L) float32."""
    start(PDL)
    tile = tl.program_id(0)
    row_tile = tl.program_id(1)
    stream = tl.program_id(2).to(tl.int64)
    wait(PDL)
    offset = (tl.load(position_ptr + stream // H) % C).to(tl.int32)
    query = row_tile * QUERIES + tl.arange(0, QUERIES)
    u = offset + query
    chunk, tiles = reach(offset, row_tile, L, C, QUERIES, KEYS)
    if tile < tiles:
        key = chunk + tile * KEYS + tl.arange(0, KEYS)
        d = tl.arange(0, DZ_P)
        row_ok = query < L
        q_ok = row_ok[:, None] & (d < DZ)[None, :]
        q = tl.load(q_ptr + (stream * L + query[:, None]) * DZ + d[None, :], mask=q_ok, other=0.0)
        rows, exists = key_rows(key, offset, L, ring_ptr + stream * (C * DZ), k_ptr + stream * L * DZ, DZ, DZ)
        k = tl.load(rows[None, :] + d[:, None], mask=exists[None, :] & (d < DZ)[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee" if IEEE else "tf32")
        allowed = (key[None, :] <= u[:, None]) & (key[None, :] >= (u // C * C)[:, None])
        scores = tl.where(allowed, scores, float("-inf"))
        peak = tl.max(scores, 1)
        weights = tl.exp(scores - tl.where(peak == float("-inf"), 0.0, peak)[:, None])
        entry = (stream * TILES + tile) * L + query
        tl.store(peaks_ptr + entry, peak, mask=row_ok)
        tl.store(totals_ptr + entry, tl.sum(weights, 1), mask=row_ok)
        at = (stream * L + query[:, None]) * (TILES * KEYS) + tile * KEYS + tl.arange(0, KEYS)[None, :]
        tl.store(weights_ptr + at, weights.to(weights_ptr.dtype.element_ty), mask=row_ok[:, None])


@triton.jit
def megalodon_softmax(
    weights_ptr,
    peaks_ptr,
    totals_ptr,
    position_ptr,
    L,
    H: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    TILES: tl.constexpr,
    TILES_P: tl.constexpr,
    PDL: tl.constexpr,
):
    """weights of `scores` times exp(the tile's peak - the query's) / the query's total: ROWS queries, GROUP tiles.

    Everything that a program reads is on its way at once.
    """
    start(PDL)
    stream = tl.program_id(2).to(tl.int64)
    query = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_ok = query < L
    mine = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    wait(PDL)
    offset = (tl.load(position_ptr + stream // H) % C).to(tl.int32)
    _, tiles = reach(offset, tl.program_id(1) * ROWS // QUERIES, L, C, QUERIES, KEYS)
    if tl.program_id(0) * GROUP < tiles:
        key = tl.arange(0, KEYS)
        at = (stream * L + query[:, None, None]) * (TILES * KEYS) + mine[None, :, None] * KEYS + key[None, None, :]
        ok = row_ok[:, None] & (mine < tiles)[None, :]
        weights = tl.load(weights_ptr + at, mask=ok[:, :, None], other=0.0)
        entry = stream * TILES * L + query
        peaks = tl.load(peaks_ptr + entry[:, None] + mine[None, :] * L, mask=ok, other=float("-inf"))
        tile = tl.arange(0, TILES_P)
        all_entries = entry[:, None] + tile[None, :] * L
        all_ok = row_ok[:, None] & (tile < tiles)[None, :]
        all_peaks = tl.load(peaks_ptr + all_entries, mask=all_ok, other=float("-inf"))
        totals = tl.load(totals_ptr + all_entries, mask=all_ok, other=0.0)
        peak = tl.where(row_ok, tl.max(all_peaks, 1), 0.0)
        total = tl.where(row_ok, tl.sum(tl.exp(all_peaks - peak[:, None]) * totals, 1), 1.0)
        factor = tl.exp(peaks - peak[:, None]) / total[:, None]
        weights = weights.to(tl.float32) * factor[:, :, None]
        tl.store(weights_ptr + at, weights.to(weights_ptr.dtype.element_ty), mask=ok[:, :, None])


@triton.jit
def megalodon_weigh(
    weights_ptr,
    v_ptr,
    ring_ptr,
    position_ptr,
    r_ptr,
    gated_ptr,
    L,
    query_tiles,
    H: tl.constexpr,
    C: tl.constexpr,
    DV: tl.constexpr,
    DV_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
    IEEE: tl.constexpr,
    PDL: tl.constexpr,
):
    """weights v times silu(r): a tile of queries of a head, DV_BLOCK features; v, r, gated (B, L, H dv)."""
    start(PDL)
    row_tile = query_tiles - 1 - tl.program_id(1)  # the longest first
    stream = tl.program_id(2).to(tl.int64)
    b, head = stream // H, stream % H
    feature = tl.program_id(0) * DV_BLOCK + tl.arange(0, DV_BLOCK)
    feature_ok = (feature < DV)[None, :]
    query = row_tile * QUERIES + tl.arange(0, QUERIES)
    row_ok = query < L
    wait(PDL)
    offset = (tl.load(position_ptr + b) % C).to(tl.int32)
    chunk, tiles = reach(offset, row_tile, L, C, QUERIES, KEYS)
    sums = tl.zeros((QUERIES, DV_BLOCK), tl.float32)
    ring = ring_ptr + stream * (C * DV)
    new = v_ptr + (b * L * H + head) * DV
    weight_rows = weights_ptr + (stream * L + query[:, None]) * (TILES * KEYS) + tl.arange(0, KEYS)[None, :]
    for tile in tl.range(0, tiles, num_stages=STAGES):
        key = chunk + tile * KEYS + tl.arange(0, KEYS)
        rows, exists = key_rows(key, offset, L, ring, new, DV, H * DV)
        v = tl.load(rows[:, None] + feature[None, :], mask=exists[:, None] & feature_ok, other=0.0)
        weights = tl.load(weight_rows + tile * KEYS, mask=row_ok[:, None], other=0.0)
        sums = tl.dot(weights, v, sums, input_precision="ieee" if IEEE else "tf32")
    at = (b * L + query[:, None]) * (H * DV) + head * DV + feature[None, :]
    ok = row_ok[:, None] & feature_ok
    dtype = gated_ptr.dtype.element_ty
    r = silu(tl.load(r_ptr + at, mask=ok, other=0.0).to(tl.float32))
    tl.store(gated_ptr + at, (sums.to(dtype).to(tl.float32) * r).to(dtype), mask=ok)


@triton.jit
def megalodon_store(
    k_ptr,
    v_ptr,
    key_ptr,
    value_ptr,
    lengths_ptr,
    position_ptr,
    L,
    H: tl.constexpr,
    C: tl.constexpr,
    DZ: tl.constexpr,
    DZ_P: tl.constexpr,
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The last (up to C) valid tokens of k (B, H, L, dz) and v (B, L, H dv) into the rings, one token and head each."""
    start(PDL)
    token = tl.program_id(0)
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    wait(PDL)
    length = tl.load(lengths_ptr + b)
    position = tl.load(position_ptr + b)
    if (token < length) & (token >= length - C):
        ring = (b * H + head) * C + (position + token) % C
        d = tl.arange(0, DZ_P)
        k = tl.load(k_ptr + ((b * H + head) * L + token) * DZ + d, mask=d < DZ, other=0.0)
        for first in tl.static_range(0, DV, BLOCK):
            e = first + tl.arange(0, BLOCK)
            v = tl.load(v_ptr + ((b * L + token) * H + head) * DV + e, mask=e < DV, other=0.0)
            tl.store(value_ptr + ring * DV + e, v, mask=e < DV)
        tl.store(key_ptr + ring * DZ + d, k, mask=d < DZ)
