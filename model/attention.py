"""Attention inside chunks, over new tokens and the ring cache.

o_t = sum_s softmax_s(q_t . k_s) v_s        over the keys s of t's chunk up to t   (arXiv 2404.08801, section 3.3)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocking import batched_matmul, first, from_blocks, known, to_blocks
from .cache import LayerCache
from .norm import accumulation_dtype, cast
from .plan import PrefillPlan

# A prefill cuts its queries into four parts. Each part takes the keys up to its own last query: of all pairs of a query
# and a key, 5/8 are computed. One part would compute all of them, though only half are visible.
QUERY_SPLITS = 4
MIN_SCORE = -1e30  # of masked pairs: finite, so that a row without any valid key stays finite


def masked_softmax(
    scores: Tensor, allowed: Tensor, dtype: torch.dtype, dropout: float = 0.0, drop_key: bool = False
) -> Tensor:
    """Softmax over the last dimension of scores (..., K) where `allowed`, computed in float32 or better.

    `dropout` drops weights afterwards, or with `drop_key` keys before the softmax (DropKey): then the remaining weights
    sum to 1, and a query that loses every key gets zeros.
    """
    scores = cast(scores, accumulation_dtype(scores.dtype))
    # F.dropout(training=dropout > 0) would do, but torch.compile(dynamic=True) makes a symbol of the rate.
    if dropout > 0 and drop_key:
        allowed = allowed & (torch.rand_like(scores) >= dropout)
        weights = torch.softmax(torch.where(allowed, scores, MIN_SCORE), dim=-1)
        return cast(torch.where(allowed.any(-1, keepdim=True), weights, 0.0), dtype)
    weights = cast(torch.softmax(torch.where(allowed, scores, MIN_SCORE), dim=-1), dtype)
    return F.dropout(weights, dropout) if dropout > 0 else weights


def attend_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PrefillPlan,
    cache: LayerCache | None,
    chunk: int,
    dropout: float = 0.0,
    drop_key: bool = False,
) -> Tensor:
    """Attention of new tokens inside their chunks: q, k (B, H, L, dz), v (B, H, L, dv) -> (B, H, L, dv).

    With a cache, queries see the ring as well, which stays as it is; without one every row starts at position 0.
    """
    if not plan.ring.single:
        return _attend_in_blocks(q, k, v, plan, cache, chunk, dropout, drop_key)
    heads, length, before = q.shape[:2], q.shape[2], 0
    time = plan.ring.time.expand(q.shape[0], -1)
    if cache is not None:
        before = plan.ring.slot_time.shape[1]
        k, v = (torch.cat([first(ring, 2, before), new], dim=2) for ring, new in ((cache.key, k), (cache.value, v)))
        time = torch.cat([plan.ring.slot_time, time], dim=1)
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    splits = QUERY_SPLITS if known(length % QUERY_SPLITS == 0) else 1
    size, out = length // splits, []
    for split in range(splits):
        start, end = split * size, before + (split + 1) * size
        query_time, chunk_start = plan.ring.time.narrow(0, start, size), plan.ring.chunk_start.narrow(1, start, size)
        allowed = visible(time.narrow(1, 0, end), query_time, chunk_start)[:, None]
        scores = torch.bmm(q.narrow(1, start, size), k.narrow(1, 0, end).mT).unflatten(0, heads)
        weights = masked_softmax(scores, allowed, v.dtype, dropout, drop_key)
        out.append(torch.bmm(weights.flatten(0, 1), v.narrow(1, 0, end)))
    return torch.cat(out, dim=1).unflatten(0, heads)


def visible(key_time: Tensor, query_time: Tensor, chunk_start: Tensor) -> Tensor:
    """Whether queries (..., Q), in chunks that start at `chunk_start` (..., Q), see keys (..., K): (..., Q, K)."""
    key_time = key_time[..., None, :]
    return (key_time <= query_time[..., None]) & (key_time >= chunk_start[..., None])


def _attend_in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PrefillPlan,
    cache: LayerCache | None,
    chunk: int,
    dropout: float,
    drop_key: bool,
) -> Tensor:
    """`attend_prefill` in blocks of C queries, each over its own keys, and with a cache over the C keys before them."""
    length = q.shape[2]
    query_time, chunk_start = plan.ring.time, plan.ring.chunk_start
    q, k, v = (to_blocks(t, 2, chunk, query_time.shape[0]) for t in (q, k, v))  # (B, H, blocks, C, d)
    key_time = query_time.expand(q.shape[0], -1, -1)
    if cache is not None:
        k, v = _behind(cache.key, k, 2), _behind(cache.value, v, 2)  # (B, H, blocks, 2C, d)
        key_time = _behind(plan.ring.slot_time, key_time, 1)
    allowed = visible(key_time, query_time, chunk_start)[:, None]
    weights = masked_softmax(batched_matmul(q, k.mT), allowed, v.dtype, dropout, drop_key)
    return from_blocks(batched_matmul(weights, v), 2, length)


def _behind(ring: Tensor, blocks: Tensor, dim: int) -> Tensor:
    """Put before each block in `dim` the block that precedes it; the ring precedes the first."""
    # The last block is cut off after `cat`, not before: a compiled graph of two blocks would have a size of 1.
    previous = first(torch.cat([ring.unsqueeze(dim), blocks], dim=dim), dim, blocks.shape[dim])
    return torch.cat([previous, blocks], dim=dim + 1)


def write_ring(ring: Tensor, new: Tensor, plan: PrefillPlan) -> None:
    """Write the last (up to C) of each row's valid new tokens (B, H, L, d) into the ring (B, H, C, d), in place."""
    if not plan.ring.single:
        new = F.pad(new, (0, 0, 0, ring.shape[2]))  # so that a gather of C tokens is in range for any L
    rows = plan.tokens.rows[:, None]
    # aten.index, since the indexing syntax would add guards on the batch to an exported graph.
    kept = torch.ops.aten.index(ring, [rows, None, plan.ring.slots])  # (B, size, H, d)
    taken = torch.ops.aten.index(new, [rows, None, plan.ring.index])
    torch.ops.aten.index_put_(ring, [rows, None, plan.ring.slots], torch.where(plan.ring.taken, taken, kept))


def attend_step(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, position: Tensor) -> Tensor:
    """Attention of one token: q, k (B, H, dz), v (B, H, dv) -> (B, H, dv). Its slots of the rings are written first."""
    chunk = cache.slots
    rows = torch.arange(q.shape[0], device=q.device)
    slot = position % chunk
    for ring, new in ((cache.key, k), (cache.value, v)):
        torch.ops.aten.index_put_(ring, [rows, None, slot], cast(new, ring.dtype))  # bfloat16 under autocast
    allowed = torch.arange(chunk, device=q.device) <= slot[:, None]  # (B, C)
    scores = batched_matmul(q[:, :, None], cache.key.mT)  # (B, H, 1, C)
    weights = masked_softmax(scores, allowed[:, None, None], cache.value.dtype)
    return batched_matmul(weights, cache.value)[:, :, 0]
