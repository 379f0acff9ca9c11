"""Kernels of a decode step's attention: over the valid slots of the ring, split among programs, then combined.

attend    scores and weighted values of a share of the slots; k goes to its slot     -> partial sums
combine   the shares, times r                                                         -> gated
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import inverse_root, start_if_few, wait


@triton.jit
def turn_of(gamma_ptr, beta_ptr, at, ok, HALF: tl.constexpr):
    """gamma + 1 over sqrt(dz), and beta, of one head's queries or keys, in halves."""
    root: tl.constexpr = (2 * HALF) ** -0.5
    gamma_lo = (tl.load(gamma_ptr + at, mask=ok, other=0.0).to(tl.float32) + 1.0) * root
    gamma_hi = (tl.load(gamma_ptr + at + HALF, mask=ok, other=0.0).to(tl.float32) + 1.0) * root
    beta_lo = tl.load(beta_ptr + at, mask=ok, other=0.0).to(tl.float32)
    beta_hi = tl.load(beta_ptr + at + HALF, mask=ok, other=0.0).to(tl.float32)
    return gamma_lo, gamma_hi, beta_lo, beta_hi


@triton.jit
def rotated(lo, hi, turn, cos, sin):
    """One head's query or key from its normalised z, in halves: scaled, shifted (see `turn_of`) and rotated."""
    a = lo * turn[0] + turn[2]
    c = hi * turn[1] + turn[3]
    return a * cos - c * sin, c * cos + a * sin


@triton.jit
def ring_block(keys, values, slots, end, half, half_ok, feature_ok, HALF: tl.constexpr, DV: tl.constexpr):
    """Keys, in halves, and values of some slots of a ring; zeros from slot `end` on."""
    ok = (slots < end)[:, None]
    rows = keys + slots[:, None] * (2 * HALF) + half[None, :]
    lo = tl.load(rows, mask=ok & half_ok[None, :], other=0.0)
    hi = tl.load(rows + HALF, mask=ok & half_ok[None, :], other=0.0)
    return lo, hi, tl.load(values[None, :] + slots[:, None] * DV, mask=ok & feature_ok[None, :], other=0.0)


@triton.jit
def megalodon_attend(
    z_ptr,
    gamma_ptr,
    beta_ptr,
    position_ptr,
    cos_ptr,
    sin_ptr,
    key_ptr,
    value_ptr,
    partial_ptr,
    statistics_ptr,
    splits,
    eps,
    H: tl.constexpr,
    C: tl.constexpr,
    HALF: tl.constexpr,
    HALF_P: tl.constexpr,
    DV: tl.constexpr,
    DV_BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One head of one row over its share of the ring's valid slots, for DV_BLOCK of the value's dv features.

    -> partial (B H splits, dv) float32, statistics (B H splits, 2): the largest score, the weights' sum. The token's
    own key is taken from z, and written to its slot by the first program of the head.
    """
    start_if_few(tl.num_programs(2), PDL)
    DV_BLOCKS: tl.constexpr = (DV + DV_BLOCK - 1) // DV_BLOCK
    part = tl.program_id(0) % DV_BLOCKS
    split = tl.program_id(0) // DV_BLOCKS
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    stream = b * H + head
    half = tl.arange(0, HALF_P)
    half_ok = half < HALF
    feature = part * DV_BLOCK + tl.arange(0, DV_BLOCK)
    feature_ok = feature < DV
    slot = tl.arange(0, SLOTS)
    keys = key_ptr + stream * (C * 2 * HALF)
    values = value_ptr + stream * (C * DV) + feature
    # No kernel of this step changes the position or the slots before the token's own: their first block is on its way
    # while earlier kernels run.
    seen = tl.load(position_ptr + b) % C  # valid slots before this token, and its own slot
    blocks = tl.cdiv(seen, SLOTS)
    per_split = tl.cdiv(blocks, splits)
    first = split * per_split
    last = tl.minimum(first + per_split, blocks)
    lo, hi, v_tile = ring_block(keys, values, first * SLOTS + slot, seen, half, half_ok, feature_ok, HALF, DV)

    at = head * (2 * HALF) + half
    Z: tl.constexpr = 2 * HALF * H
    dtype = key_ptr.dtype.element_ty
    q_turn = turn_of(gamma_ptr, beta_ptr, at, half_ok, HALF)
    k_turn = turn_of(gamma_ptr + Z, beta_ptr + Z, at, half_ok, HALF)
    mine = split == 0  # the first split begins with the token itself, the others with nothing

    wait(PDL)
    z_lo = tl.load(z_ptr + stream * (2 * HALF) + half, mask=half_ok, other=0.0)
    z_hi = tl.load(z_ptr + stream * (2 * HALF) + HALF + half, mask=half_ok, other=0.0)
    cos = tl.load(cos_ptr + b * HALF + half, mask=half_ok, other=0.0)
    sin = tl.load(sin_ptr + b * HALF + half, mask=half_ok, other=0.0)
    sums = tl.load(values + seen * DV, mask=feature_ok & mine, other=0.0).to(tl.float32)
    factor = inverse_root(tl.sum(z_lo * z_lo + z_hi * z_hi, 0) / (2 * HALF), eps)
    q_lo, q_hi = rotated(z_lo * factor, z_hi * factor, q_turn, cos, sin)
    k_lo, k_hi = rotated(z_lo * factor, z_hi * factor, k_turn, cos, sin)
    q_lo, q_hi = q_lo.to(dtype).to(tl.float32), q_hi.to(dtype).to(tl.float32)
    k_lo, k_hi = k_lo.to(dtype), k_hi.to(dtype)
    if tl.program_id(0) == 0:
        tl.store(keys + seen * (2 * HALF) + half, k_lo, mask=half_ok)
        tl.store(keys + seen * (2 * HALF) + HALF + half, k_hi, mask=half_ok)

    own = tl.sum(q_lo * k_lo.to(tl.float32) + q_hi * k_hi.to(tl.float32), 0)
    peak = tl.where(mine, own, float("-inf"))
    total = tl.where(mine, 1.0, 0.0)
    end = tl.minimum(seen, last * SLOTS)
    for block in range(first, last):
        scores = tl.sum(lo.to(tl.float32) * q_lo[None, :] + hi.to(tl.float32) * q_hi[None, :], 1)
        scores = tl.where(block * SLOTS + slot < seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 0))
        shrink = tl.exp(peak - new_peak)
        weights = tl.exp(scores - new_peak)
        total = total * shrink + tl.sum(weights, 0)
        sums = sums * shrink + tl.sum(weights[:, None] * v_tile.to(tl.float32), 0)
        peak = new_peak
        slots = (block + 1) * SLOTS + slot
        lo, hi, v_tile = ring_block(keys, values, slots, end, half, half_ok, feature_ok, HALF, DV)
    entry = stream * splits + split
    tl.store(partial_ptr + entry * DV + feature, sums, mask=feature_ok)
    if part == 0:
        tl.store(statistics_ptr + entry * 2, peak)
        tl.store(statistics_ptr + entry * 2 + 1, total)


@triton.jit
def megalodon_combine(
    partial_ptr,
    statistics_ptr,
    r_ptr,
    gated_ptr,
    splits,
    H: tl.constexpr,
    DV: tl.constexpr,
    DV_BLOCK: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """softmax-weighted sum over the splits, times r: gated (B, E), in the order of the heads."""
    start_if_few(tl.num_programs(2), PDL)
    stream = tl.program_id(2).to(tl.int64) * H + tl.program_id(1)
    feature = tl.program_id(0) * DV_BLOCK + tl.arange(0, DV_BLOCK)
    feature_ok = feature < DV
    split = tl.arange(0, MAX_SPLITS)
    used = split < splits
    entry = stream * splits + split
    wait(PDL)
    peaks = tl.load(statistics_ptr + entry * 2, mask=used, other=float("-inf"))
    totals = tl.load(statistics_ptr + entry * 2 + 1, mask=used, other=0.0)
    r = tl.load(r_ptr + stream * DV + feature, mask=feature_ok, other=0.0)
    partials = tl.load(
        partial_ptr + entry[:, None] * DV + feature[None, :], mask=used[:, None] & feature_ok[None, :], other=0.0
    )
    dtype = gated_ptr.dtype.element_ty
    weights = tl.exp(peaks - tl.max(peaks, 0))
    o = (tl.sum(partials * weights[:, None], 0) / tl.sum(totals * weights, 0)).to(dtype)
    tl.store(gated_ptr + stream * DV + feature, o.to(tl.float32) * r.to(tl.float32), mask=feature_ok)
