"""Attention of one decode step over the ring cache, split over programs (as flash-decoding does), times r.

    megalodon_attend           scores and weighted values of a split of the valid slots; k into its slot
    megalodon_combine_splits   the splits brought to one maximum and added, times r

    Example: C = 16 slots, position 21 -> the token's own slot is 5; slots 0 .. 4 hold the earlier tokens of its chunk.

`model/attention.py: attend_step` is the plain form.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from ...rotary import rotate
from ..elementwise import rsqrt
from ..launch import (
    grid_dependency_wait,
    launch,
    launch_dependents_if_small,
    next_power_of_2,
    supports_pdl,
)
from ..rotary import load_query_key_affine, scale_and_rotate

FULL_GPU_PROGRAMS = 264  # two for each multiprocessor of a large GPU: slots are split until there are so many
_FEATURE_BYTES = 2048  # of a slot's value that a program takes: 16 bytes a thread, over all slots of a block
_SLOTS = 16  # slots of the ring that a program reads at a time
_MAX_SPLITS = 128
_COMBINE_FEATURES = 32  # of dv, in one program of megalodon_combine_splits


def attend_reference(
    z: Tensor,
    r: Tensor,
    gamma: Tensor,
    beta: Tensor,
    position: Tensor,
    cos: Tensor,
    sin: Tensor,
    key: Tensor,
    value: Tensor,
    eps: float,
) -> Tensor:
    """softmax(q k) v times r, (B, E), over slots 0 .. position % C; the token's key is written to its slot."""
    (batch, heads, chunk, dz), slot = key.shape, position % key.shape[2]
    z = z.unflatten(1, (heads, dz)) * torch.rsqrt(z.unflatten(1, (heads, dz)).square().mean(-1, True) + eps)
    affine = ((gamma.float() + 1) / dz**0.5).view(2, 1, heads, dz), beta.float().view(2, 1, heads, dz)
    q, k = rotate(z * affine[0] + affine[1], cos[:, None], sin[:, None]).to(key.dtype)
    key[torch.arange(batch), :, slot] = k
    scores = (key.float() @ q.float()[..., None])[..., 0]  # (B, H, C)
    scores = scores.masked_fill(torch.arange(chunk) > slot[:, None, None], float("-inf"))
    o = (F.softmax(scores, -1)[:, :, None] @ value.float()).flatten(1).to(r.dtype)
    return (o.float() * r.float()).to(r.dtype)


@triton_op("megalodon::attend", mutates_args={"key"})
def attend(
    z: Tensor,
    r: Tensor,
    gamma: Tensor,
    beta: Tensor,
    position: Tensor,
    cos: Tensor,
    sin: Tensor,
    key: Tensor,
    value: Tensor,
    eps: float,
) -> Tensor:
    """Attention of one token a row over the ring, times r: (B, E).

    z (B, Z) float32; r (B, E); gamma, beta (2, Z), queries first; position (B) int64; cos, sin (B, dz/2); key
    (B, H, C, dz), whose slot is written here; value (B, H, C, dv), whose slot `project` has written.
    """
    batch, heads, chunk, dv = value.shape
    half = key.shape[3] // 2
    dv_block = min(next_power_of_2(dv), _FEATURE_BYTES // r.element_size())
    dv_blocks = -(-dv // dv_block)
    splits = torch.sym_max(1, torch.sym_min(_MAX_SPLITS, FULL_GPU_PROGRAMS // (batch * heads * dv_blocks)))
    entries = batch * heads + FULL_GPU_PROGRAMS // dv_blocks  # at least batch heads splits
    partial = z.new_empty(entries, dv)
    statistics = z.new_empty(entries, 2)
    gated = torch.empty_like(r)
    pdl = supports_pdl(z)
    launch(megalodon_attend, (dv_blocks * splits, heads, batch))(
        *(z, gamma, beta, position, cos, sin, key, value, partial, statistics, splits, eps),
        **{"H": heads, "C": chunk, "HALF": half, "HALF_P": next_power_of_2(half)},
        **{"DV": dv, "DV_BLOCK": dv_block, "SLOTS": _SLOTS, "PDL": pdl},
        num_warps=max(dv_block * r.element_size() // 512, 1),
    )
    block = min(next_power_of_2(dv), _COMBINE_FEATURES)
    launch(megalodon_combine_splits, (-(-dv // block), heads, batch))(
        *(partial, statistics, r, gated, splits),
        **{"H": heads, "DV": dv, "DV_BLOCK": block, "MAX_SPLITS": _MAX_SPLITS, "PDL": pdl},
        num_warps=4,
    )
    return gated


@triton.jit
def split_blocks(seen, split, splits, SLOTS: tl.constexpr):
    """The blocks of SLOTS slots, first up to but not including last, that a split takes of `seen` slots."""
    blocks = tl.cdiv(seen, SLOTS)
    per_split = tl.cdiv(blocks, splits)
    first = split * per_split
    return first, tl.minimum(first + per_split, blocks)


@triton.jit
def load_slots(keys, values, slots, end, half, half_ok, feature_ok, HALF: tl.constexpr, DV: tl.constexpr):
    """Keys of some slots of a ring, in halves (SLOTS, HALF_P), and values (SLOTS, DV_BLOCK); 0 from slot `end` on."""
    ok = (slots < end)[:, None]
    rows = keys + slots[:, None] * (2 * HALF) + half[None, :]
    lo = tl.load(rows, mask=ok & half_ok[None, :], other=0.0)
    hi = tl.load(rows + HALF, mask=ok & half_ok[None, :], other=0.0)
    return lo, hi, tl.load(values[None, :] + slots[:, None] * DV, mask=ok & feature_ok[None, :], other=0.0)


@triton.jit
def add_slots(lo, hi, v, q_lo, q_hi, sums, row_max, row_sumexp, valid):
    """Online softmax: a block of slots into sums (DV_BLOCK), the largest score, and the sum of exp(score - it)."""
    scores = tl.sum(lo.to(tl.float32) * q_lo[None, :] + hi.to(tl.float32) * q_hi[None, :], 1)
    scores = tl.where(valid, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 0))
    shrink = tl.exp(row_max - new_max)
    weights = tl.exp(scores - new_max)
    row_sumexp = row_sumexp * shrink + tl.sum(weights, 0)
    sums = sums * shrink + tl.sum(weights[:, None] * v.to(tl.float32), 0)
    return sums, new_max, row_sumexp


@triton.jit
def query_and_key(
    z_ptr, cos_ptr, sin_ptr, values, keys,
    head_row, b, seen, half, half_ok, feature_ok, own_split, q_affine, k_affine, eps,
    HALF: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """The token's q float32 and k, in halves, and its value float32 if this split has it: all loads, then the norm."""
    z_lo = tl.load(z_ptr + head_row * (2 * HALF) + half, mask=half_ok, other=0.0)
    z_hi = tl.load(z_ptr + head_row * (2 * HALF) + HALF + half, mask=half_ok, other=0.0)
    cos = tl.load(cos_ptr + b * HALF + half, mask=half_ok, other=0.0)
    sin = tl.load(sin_ptr + b * HALF + half, mask=half_ok, other=0.0)
    value = tl.load(values + seen * DV, mask=feature_ok & own_split, other=0.0).to(tl.float32)
    factor = rsqrt(tl.sum(z_lo * z_lo + z_hi * z_hi, 0) / (2 * HALF), eps)
    q_lo, q_hi = scale_and_rotate(z_lo * factor, z_hi * factor, q_affine, cos, sin)
    k_lo, k_hi = scale_and_rotate(z_lo * factor, z_hi * factor, k_affine, cos, sin)
    dtype = keys.dtype.element_ty
    q_lo, q_hi = q_lo.to(dtype).to(tl.float32), q_hi.to(dtype).to(tl.float32)
    return q_lo, q_hi, k_lo.to(dtype), k_hi.to(dtype), value


@triton.jit
def megalodon_attend(
    z_ptr, gamma_ptr, beta_ptr, position_ptr, cos_ptr, sin_ptr, key_ptr, value_ptr, partial_ptr, statistics_ptr,
    splits, eps,
    H: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr, HALF_P: tl.constexpr,
    DV: tl.constexpr, DV_BLOCK: tl.constexpr, SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One head of one row over its split of the ring's valid slots, for DV_BLOCK of the value's DV features.

    In: z (B, H 2 HALF) float32; gamma, beta (2, H 2 HALF); position (B) int64; cos, sin (B, HALF); value (B, H, C, DV).
    In and out: key (B, H, C, 2 HALF); the first program of a head writes the token's key, taken from z, to its slot.
    Out: partial (B H splits, DV) float32, the weighted values; statistics (B H splits, 2): largest score, sum of exp.
    Grid: (ceil(DV / DV_BLOCK) splits, H, B). q, the sums and the next block of slots stay in registers.
    """
    launch_dependents_if_small(tl.num_programs(2), PDL)
    DV_BLOCKS: tl.constexpr = (DV + DV_BLOCK - 1) // DV_BLOCK
    dv_block = tl.program_id(0) % DV_BLOCKS
    split = tl.program_id(0) // DV_BLOCKS
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    head_row = b * H + head
    half = tl.arange(0, HALF_P)
    half_ok = half < HALF
    feature = dv_block * DV_BLOCK + tl.arange(0, DV_BLOCK)
    feature_ok = feature < DV
    slot = tl.arange(0, SLOTS)
    keys = key_ptr + head_row * (C * 2 * HALF)
    values = value_ptr + head_row * (C * DV) + feature
    # No kernel of this step changes the position, or the slots before the token's own. Their first block loads while
    # earlier kernels run.
    seen = tl.load(position_ptr + b) % C  # valid slots before this token, and its own slot
    first, last = split_blocks(seen, split, splits, SLOTS)
    lo, hi, v = load_slots(keys, values, first * SLOTS + slot, seen, half, half_ok, feature_ok, HALF, DV)
    at = head * (2 * HALF) + half
    Z: tl.constexpr = 2 * HALF * H
    q_affine = load_query_key_affine(gamma_ptr, beta_ptr, at, half_ok, HALF)
    k_affine = load_query_key_affine(gamma_ptr + Z, beta_ptr + Z, at, half_ok, HALF)
    own_split = split == 0  # the first split starts with the token itself, the others with nothing
    grid_dependency_wait(PDL)
    q_lo, q_hi, k_lo, k_hi, sums = query_and_key(
        z_ptr, cos_ptr, sin_ptr, values, keys, head_row, b, seen, half, half_ok, feature_ok, own_split,
        q_affine, k_affine, eps, HALF, DV,
    )  # fmt: skip
    if tl.program_id(0) == 0:
        tl.store(keys + seen * (2 * HALF) + half, k_lo, mask=half_ok)
        tl.store(keys + seen * (2 * HALF) + HALF + half, k_hi, mask=half_ok)
    own_score = tl.sum(q_lo * k_lo.to(tl.float32) + q_hi * k_hi.to(tl.float32), 0)
    row_max = tl.where(own_split, own_score, float("-inf"))
    row_sumexp = tl.where(own_split, 1.0, 0.0)
    end = tl.minimum(seen, last * SLOTS)
    for block in range(first, last):
        valid = block * SLOTS + slot < seen
        sums, row_max, row_sumexp = add_slots(lo, hi, v, q_lo, q_hi, sums, row_max, row_sumexp, valid)
        slots = (block + 1) * SLOTS + slot
        lo, hi, v = load_slots(keys, values, slots, end, half, half_ok, feature_ok, HALF, DV)
    entry = head_row * splits + split
    tl.store(partial_ptr + entry * DV + feature, sums, mask=feature_ok)
    if dv_block == 0:
        tl.store(statistics_ptr + entry * 2, row_max)
        tl.store(statistics_ptr + entry * 2 + 1, row_sumexp)


@triton.jit
def megalodon_combine_splits(
    partial_ptr, statistics_ptr, r_ptr, gated_ptr,
    splits,
    H: tl.constexpr, DV: tl.constexpr, DV_BLOCK: tl.constexpr, MAX_SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """gated = (sum over the splits of their weighted values) / (their sum of exp) * r.

    In: partial (B H splits, DV), statistics (B H splits, 2) float32 of `megalodon_attend`; r (B, H DV).
    Out: gated (B, H DV). Grid: (ceil(DV / DV_BLOCK), H, B). All splits of DV_BLOCK features stay in registers.
    """
    launch_dependents_if_small(tl.num_programs(2), PDL)
    head_row = tl.program_id(2).to(tl.int64) * H + tl.program_id(1)
    feature = tl.program_id(0) * DV_BLOCK + tl.arange(0, DV_BLOCK)
    feature_ok = feature < DV
    split = tl.arange(0, MAX_SPLITS)
    used = split < splits
    entry = head_row * splits + split
    grid_dependency_wait(PDL)
    split_max = tl.load(statistics_ptr + entry * 2, mask=used, other=float("-inf"))
    split_sumexp = tl.load(statistics_ptr + entry * 2 + 1, mask=used, other=0.0)
    r = tl.load(r_ptr + head_row * DV + feature, mask=feature_ok, other=0.0)
    partials = tl.load(
        partial_ptr + entry[:, None] * DV + feature[None, :], mask=used[:, None] & feature_ok[None, :], other=0.0
    )
    dtype = gated_ptr.dtype.element_ty
    weights = tl.exp(split_max - tl.max(split_max, 0))
    o = (tl.sum(partials * weights[:, None], 0) / tl.sum(split_sumexp * weights, 0)).to(dtype)
    tl.store(gated_ptr + head_row * DV + feature, o.to(tl.float32) * r.to(tl.float32), mask=feature_ok)
