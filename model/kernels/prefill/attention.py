"""Attention of a prefill: new tokens over the keys of their chunk, both those in the ring and the new ones.

    megalodon_rotate       q and k of every new token from z
    megalodon_scores       tiles of exp(q k - row_max), where row_max is the tile's largest score of each query
    megalodon_softmax      the tiles of a query brought to one maximum and normalised, in place
    megalodon_pv_matmul    their product with v, times silu(r)
    megalodon_store_ring   the last tokens' keys and values into the ring

The keys of a row are numbered by u: 0 .. offset - 1 are the ring's valid slots, offset + i is new token i. A query at u
attends from the start of its chunk, u // C * C, to u.

    Example: C = 16, position 21, 30 new tokens -> offset 5. The queries are u = 5 .. 34; u = 20 sees keys 16 .. 20.

Head sizes of keys and values differ (dz, dv), and dv may be too large for one program. So the scores are computed once,
and every block of dv reads them, from shared memory straight into the tensor cores. When each block normalised them
itself, in registers, the product took twice the time. `model/attention.py: attend_prefill` is the plain form.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from ...rotary import rotate
from ..elementwise import rsqrt, silu
from ..launch import grid_dependency_wait, launch, launch_dependents, next_power_of_2, supports_pdl
from ..rotary import load_query_key_affine, scale_and_rotate

_SOFTMAX_ROWS, _SOFTMAX_TILES = 16, 8  # queries and tiles of keys that one program normalises
_KEYS = 64  # in a tile


def attend_chunks_reference(
    z: Tensor,
    v: Tensor,
    r: Tensor,
    gamma: Tensor,
    beta: Tensor,
    lengths: Tensor,
    position: Tensor,
    cos: Tensor,
    sin: Tensor,
    key: Tensor,
    value: Tensor,
    eps: float,
) -> Tensor:
    """Token by token: each goes to its slot, then attends to slots 0 .. its own. Zeros where not valid."""
    (batch, heads, chunk, dz), gated = key.shape, torch.zeros_like(r)
    heads_z = z.float().unflatten(2, (heads, dz))
    heads_z = heads_z * torch.rsqrt(heads_z.square().mean(-1, keepdim=True) + eps)
    affine = ((gamma.float() + 1) / dz**0.5).view(2, 1, 1, heads, dz), beta.float().view(2, 1, 1, heads, dz)
    q, k = rotate(heads_z * affine[0] + affine[1], cos[:, :, None], sin[:, :, None]).to(z.dtype)
    for b in range(batch):
        for t in range(int(lengths[b])):
            slot = int(position[b] + t) % chunk
            key[b, :, slot], value[b, :, slot] = k[b, t], v[b, t].unflatten(0, (heads, -1))
            scores = (key[b, :, : slot + 1].float() @ q[b, t].float()[..., None])[..., 0]  # (H, slots)
            o = (F.softmax(scores, -1)[:, None] @ value[b, :, : slot + 1].float()).flatten().to(r.dtype)
            gated[b, t] = o.float() * F.silu(r[b, t].float())
    return gated


@triton_op("megalodon::attend_chunks", mutates_args={"key", "value"})
def attend_chunks(
    z: Tensor,
    v: Tensor,
    r: Tensor,
    gamma: Tensor,
    beta: Tensor,
    lengths: Tensor,
    position: Tensor,
    cos: Tensor,
    sin: Tensor,
    key: Tensor,
    value: Tensor,
    eps: float,
) -> Tensor:
    """Attention of new tokens inside their chunks, times silu(r): (B, L, E); what is not valid has no meaning.

    z (B, L, Z); v, r (B, L, E); gamma, beta (2, Z), queries first; lengths, position (B) int64; cos, sin (B, L, dz/2).
    The rings key (B, H, C, dz) and value (B, H, C, dv) take the last (up to C) valid tokens of each row.
    """
    batch, length, _ = z.shape
    heads, chunk, dz, dv = key.shape[1], key.shape[2], key.shape[3], value.shape[3]
    q = z.new_empty(batch, heads, length, dz)
    k = torch.empty_like(q)
    single = z.dtype == torch.float32
    pdl, queries = supports_pdl(z), 64 if single else 128
    tiles = -(-chunk // _KEYS) + queries // _KEYS  # a tile of queries may reach into the next chunk
    per_head = {"H": heads, "PDL": pdl}
    launch(megalodon_rotate, (length, heads, batch))(
        *(z, gamma, beta, cos, sin, q, k, length, eps),
        **{**per_head, "HALF": dz // 2, "HALF_P": next_power_of_2(dz // 2), "num_warps": 1},
    )
    weights = z.new_empty(batch, heads, length, tiles * _KEYS)
    row_max = z.new_empty(batch, heads, tiles, length, dtype=torch.float32)
    row_sumexp = torch.empty_like(row_max)
    query_tiles = (length + queries - 1) // queries
    shape = {**per_head, "C": chunk, "QUERIES": queries, "KEYS": _KEYS, "TILES": tiles}
    _launch_softmax(q, k, key, position, weights, row_max, row_sumexp, query_tiles, shape)
    gated = torch.empty_like(r)
    # Large blocks of dv read the weights less often, small ones leave no multiprocessor idle.
    dv_block = max(16, min(next_power_of_2(dv), 128 if single or heads < 4 else 256))
    launch(megalodon_pv_matmul, (-(-dv // dv_block), query_tiles, batch * heads))(
        *(weights, v, value, position, r, gated, length, query_tiles),
        **{**shape, "DV": dv, "DV_BLOCK": dv_block, "STAGES": 3 if single else 4, "IEEE": single, "num_warps": 8},
    )
    block = min(next_power_of_2(dv), 2048)
    sizes = {**per_head, "C": chunk, "DZ": dz, "DZ_P": next_power_of_2(dz), "DV": dv, "BLOCK": block}
    launch(megalodon_store_ring, (length, heads, batch))(
        *(k, v, key, value, lengths, position, length), **sizes, num_warps=max(block // 512, 1)
    )
    return gated


def _launch_softmax(
    q: Tensor,
    k: Tensor,
    key: Tensor,
    position: Tensor,
    weights: Tensor,
    row_max: Tensor,
    row_sumexp: Tensor,
    query_tiles: int,
    shape: dict[str, Any],
) -> None:
    """softmax(q k) of q, k (B, H, L, dz) and the ring `key` into weights (B, H, L, TILES KEYS).

    The tiles of keys count from the start of the chunk. row_max and row_sumexp (B, H, TILES, L) float32 are
    written on the way.
    """
    batch, heads, length, dz = q.shape
    launch(megalodon_scores, (shape["TILES"], query_tiles, batch * heads))(
        *(q, k, key, position, weights, row_max, row_sumexp, length),
        **{**shape, "DZ": dz, "DZ_P": max(next_power_of_2(dz), 16), "IEEE": q.dtype == torch.float32, "num_warps": 4},
    )
    sizes = {**shape, "ROWS": _SOFTMAX_ROWS, "GROUP": _SOFTMAX_TILES, "TILES_P": next_power_of_2(shape["TILES"])}
    grid = (-(-shape["TILES"] // _SOFTMAX_TILES), (length + _SOFTMAX_ROWS - 1) // _SOFTMAX_ROWS, batch * heads)
    launch(megalodon_softmax, grid)(*(weights, row_max, row_sumexp, position, length), **sizes, num_warps=4)


@triton.jit
def megalodon_rotate(
    z_ptr, gamma_ptr, beta_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr,
    L, eps,
    H: tl.constexpr, HALF: tl.constexpr, HALF_P: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """q and k of every new token: z normalised per head, scaled and shifted (gamma, beta), rotated.

    In: z (B, L, H 2 HALF); gamma, beta (2, H 2 HALF); cos, sin (B, L, HALF). Out: q, k (B, H, L, 2 HALF).
    Grid: (L, H, B), one head of a token a program, in registers.
    """
    launch_dependents(PDL)
    token = tl.program_id(0)
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    half = tl.arange(0, HALF_P)
    ok = half < HALF
    at = head * (2 * HALF) + half
    grid_dependency_wait(PDL)
    row = (b * L + token) * (2 * HALF * H)
    lo = tl.load(z_ptr + row + at, mask=ok, other=0.0).to(tl.float32)
    hi = tl.load(z_ptr + row + at + HALF, mask=ok, other=0.0).to(tl.float32)
    factor = rsqrt(tl.sum(lo * lo + hi * hi, 0) / (2 * HALF), eps)
    cos = tl.load(cos_ptr + (b * L + token) * HALF + half, mask=ok, other=0.0)
    sin = tl.load(sin_ptr + (b * L + token) * HALF + half, mask=ok, other=0.0)
    lo, hi = lo * factor, hi * factor
    Z: tl.constexpr = 2 * HALF * H
    q_affine = load_query_key_affine(gamma_ptr, beta_ptr, at, ok, HALF)
    q_lo, q_hi = scale_and_rotate(lo, hi, q_affine, cos, sin)
    k_affine = load_query_key_affine(gamma_ptr + Z, beta_ptr + Z, at, ok, HALF)
    k_lo, k_hi = scale_and_rotate(lo, hi, k_affine, cos, sin)
    out = ((b * H + head) * L + token) * (2 * HALF) + half
    dtype = q_ptr.dtype.element_ty
    tl.store(q_ptr + out, q_lo.to(dtype), mask=ok)
    tl.store(q_ptr + out + HALF, q_hi.to(dtype), mask=ok)
    tl.store(k_ptr + out, k_lo.to(dtype), mask=ok)
    tl.store(k_ptr + out + HALF, k_hi.to(dtype), mask=ok)


@triton.jit
def key_rows(u, offset, L, ring_ptr, new_ptr, ring_stride: tl.constexpr, new_stride: tl.constexpr):
    """Pointers to the keys (or values) number u, in the ring or among the new ones, and which of them exist.

    Both are offsets from the ring. A choice between two pointers would hide from the compiler that rows are aligned,
    and it would load them number by number. Tensors begin at multiples of 16 bytes.
    """
    size: tl.constexpr = ring_ptr.dtype.element_ty.primitive_bitwidth // 8
    apart = tl.multiple_of((new_ptr.to(tl.int64) - ring_ptr.to(tl.int64)) // size, 16 // size)
    new = (u >= offset).to(tl.int64)
    rows = ring_ptr + (
        u.to(tl.int64) * ring_stride + new * (apart - offset * new_stride + u * (new_stride - ring_stride))
    )
    return rows, u - offset < L


@triton.jit
def visible_tiles(offset, row_tile, L, C: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """For a tile of queries: the number u of its first key, and how many tiles of keys it sees from there on."""
    first = offset + row_tile * QUERIES
    chunk = first // C * C
    tiles = (first + QUERIES - 1 - chunk) // KEYS + 1
    return chunk, tl.minimum(tiles, tl.cdiv(offset + L - chunk, KEYS))


@triton.jit
def megalodon_scores(
    q_ptr, k_ptr, ring_ptr, position_ptr, weights_ptr, row_max_ptr, row_sumexp_ptr,
    L,
    H: tl.constexpr, C: tl.constexpr, DZ: tl.constexpr, DZ_P: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, TILES: tl.constexpr, IEEE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """exp(q k - row_max) of a tile of QUERIES and KEYS on the tensor cores, with row_max and the sum of exp.

    In: q, k (B, H, L, DZ); ring (B, H, C, DZ); position (B). Out: weights (B, H, L, TILES KEYS); row_max, row_sumexp
    (B, H, TILES, L) float32. Grid: (TILES, ceil(L / QUERIES), B H). The tile of scores stays in registers.
    """
    launch_dependents(PDL)
    tile = tl.program_id(0)
    row_tile = tl.program_id(1)
    head_row = tl.program_id(2).to(tl.int64)
    grid_dependency_wait(PDL)
    offset = (tl.load(position_ptr + head_row // H) % C).to(tl.int32)
    query = row_tile * QUERIES + tl.arange(0, QUERIES)
    u = offset + query
    chunk, tiles = visible_tiles(offset, row_tile, L, C, QUERIES, KEYS)
    if tile < tiles:
        key = chunk + tile * KEYS + tl.arange(0, KEYS)
        d = tl.arange(0, DZ_P)
        row_ok = query < L
        q_ok = row_ok[:, None] & (d < DZ)[None, :]
        q = tl.load(q_ptr + (head_row * L + query[:, None]) * DZ + d[None, :], mask=q_ok, other=0.0)
        rows, exists = key_rows(key, offset, L, ring_ptr + head_row * (C * DZ), k_ptr + head_row * L * DZ, DZ, DZ)
        k = tl.load(rows[None, :] + d[:, None], mask=exists[None, :] & (d < DZ)[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee" if IEEE else "tf32")
        allowed = (key[None, :] <= u[:, None]) & (key[None, :] >= (u // C * C)[:, None])
        scores = tl.where(allowed, scores, float("-inf"))
        row_max = tl.max(scores, 1)
        weights = tl.exp(scores - tl.where(row_max == float("-inf"), 0.0, row_max)[:, None])
        entry = (head_row * TILES + tile) * L + query
        tl.store(row_max_ptr + entry, row_max, mask=row_ok)
        tl.store(row_sumexp_ptr + entry, tl.sum(weights, 1), mask=row_ok)
        at = (head_row * L + query[:, None]) * (TILES * KEYS) + tile * KEYS + tl.arange(0, KEYS)[None, :]
        tl.store(weights_ptr + at, weights.to(weights_ptr.dtype.element_ty), mask=row_ok[:, None])


@triton.jit
def megalodon_softmax(
    weights_ptr, row_max_ptr, row_sumexp_ptr, position_ptr,
    L,
    H: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, TILES: tl.constexpr, TILES_P: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """In place: weights of `megalodon_scores` -> softmax weights, times exp(tile's maximum - query's) / query's sum.

    In and out: weights (B, H, L, TILES KEYS). In: row_max, row_sumexp (B, H, TILES, L) float32; position (B).
    Grid: (ceil(TILES / GROUP), ceil(L / ROWS), B H): ROWS queries and GROUP tiles of keys a program. Its weights, and
    the maxima and sums of all tiles of its queries, stay in registers. All loads are issued before the first reduction.
    """
    launch_dependents(PDL)
    head_row = tl.program_id(2).to(tl.int64)
    query = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_ok = query < L
    own = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    grid_dependency_wait(PDL)
    offset = (tl.load(position_ptr + head_row // H) % C).to(tl.int32)
    _, tiles = visible_tiles(offset, tl.program_id(1) * ROWS // QUERIES, L, C, QUERIES, KEYS)
    if tl.program_id(0) * GROUP < tiles:
        key = tl.arange(0, KEYS)
        at = (head_row * L + query[:, None, None]) * (TILES * KEYS) + own[None, :, None] * KEYS + key[None, None, :]
        ok = row_ok[:, None] & (own < tiles)[None, :]
        weights = tl.load(weights_ptr + at, mask=ok[:, :, None], other=0.0)
        entry = head_row * TILES * L + query
        own_max = tl.load(row_max_ptr + entry[:, None] + own[None, :] * L, mask=ok, other=float("-inf"))
        tile = tl.arange(0, TILES_P)
        all_entries = entry[:, None] + tile[None, :] * L
        all_ok = row_ok[:, None] & (tile < tiles)[None, :]
        all_max = tl.load(row_max_ptr + all_entries, mask=all_ok, other=float("-inf"))
        all_sumexp = tl.load(row_sumexp_ptr + all_entries, mask=all_ok, other=0.0)
        query_max = tl.where(row_ok, tl.max(all_max, 1), 0.0)
        query_sum = tl.where(row_ok, tl.sum(tl.exp(all_max - query_max[:, None]) * all_sumexp, 1), 1.0)
        factor = tl.exp(own_max - query_max[:, None]) / query_sum[:, None]
        weights = weights.to(tl.float32) * factor[:, :, None]
        tl.store(weights_ptr + at, weights.to(weights_ptr.dtype.element_ty), mask=ok[:, :, None])


@triton.jit
def megalodon_pv_matmul(
    weights_ptr, v_ptr, ring_ptr, position_ptr, r_ptr, gated_ptr,
    L, query_tiles,
    H: tl.constexpr, C: tl.constexpr, DV: tl.constexpr, DV_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr, IEEE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """gated = (softmax weights times v) * silu(r), on the tensor cores.

    In: weights (B, H, L, TILES KEYS); v, r (B, L, H DV); ring (B, H, C, DV); position (B). Out: gated (B, L, H DV).
    Grid: (ceil(DV / DV_BLOCK), ceil(L / QUERIES), B H), the tiles of queries that see the most keys first. The tile of
    sums (QUERIES, DV_BLOCK) float32 stays in registers; weights and v pass through shared memory in STAGES buffers.
    """
    launch_dependents(PDL)
    row_tile = query_tiles - 1 - tl.program_id(1)
    head_row = tl.program_id(2).to(tl.int64)
    b, head = head_row // H, head_row % H
    feature = tl.program_id(0) * DV_BLOCK + tl.arange(0, DV_BLOCK)
    feature_ok = (feature < DV)[None, :]
    query = row_tile * QUERIES + tl.arange(0, QUERIES)
    row_ok = query < L
    grid_dependency_wait(PDL)
    offset = (tl.load(position_ptr + b) % C).to(tl.int32)
    chunk, tiles = visible_tiles(offset, row_tile, L, C, QUERIES, KEYS)
    sums = tl.zeros((QUERIES, DV_BLOCK), tl.float32)
    ring = ring_ptr + head_row * (C * DV)
    new = v_ptr + (b * L * H + head) * DV
    weight_rows = weights_ptr + (head_row * L + query[:, None]) * (TILES * KEYS) + tl.arange(0, KEYS)[None, :]
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
def megalodon_store_ring(
    k_ptr, v_ptr, key_ptr, value_ptr, lengths_ptr, position_ptr,
    L,
    H: tl.constexpr, C: tl.constexpr, DZ: tl.constexpr, DZ_P: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The last (up to C) valid tokens of each row into slots (position + token) % C of the rings.

    In: k (B, H, L, DZ); v (B, L, H DV); lengths, position (B). Out: key (B, H, C, DZ), value (B, H, C, DV).
    Grid: (L, H, B), one head of a token a program. The value is copied BLOCK features at a time.
    """
    launch_dependents(PDL)
    token = tl.program_id(0)
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    grid_dependency_wait(PDL)
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
