"""Gated attention inside chunks: rotary positions, the ring cache, and the block that combines it with the CEMA."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import guard_or_false

from .blocking import batched_matmul, compact, first, from_blocks, to_blocks
from .cache import LayerCache
from .config import MegalodonConfig
from .constants import DerivedConstants
from .ema import ComplexEMA
from .norm import NormState, RMSNorm, TimestepNorm, accumulation_dtype, cast
from .plan import PrefillPlan

if TYPE_CHECKING:
    from .sequence_parallel import Relay


class Rotary(NamedTuple):
    """Cosines and sines (..., dz/2) of some positions."""

    cos: Tensor
    sin: Tensor


PARTS = 4  # of the queries of a prefill: 5/8 of all pairs of new tokens are computed, of which half are visible
MIN_SCORE = -1e30  # for masked scores: finite, so that a row without any valid key stays finite


class RotaryTable(DerivedConstants):
    """Cosines and sines (C, dz/2) of the positions inside a chunk, computed in float64."""

    anchor: Tensor

    def __init__(self, head_dim: int, chunk_size: int, base: float | None) -> None:
        super().__init__()
        self.head_dim, self.chunk_size, self.base = head_dim, chunk_size, base or 10_000.0
        self.register_buffer("anchor", torch.zeros(0), persistent=False)  # follows the module's device and dtype

    def derive(self) -> dict[str, Tensor]:
        """The two tables."""
        device = self.anchor.device
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=device)
        positions = torch.arange(self.chunk_size, dtype=torch.float64, device=device)
        angle = torch.outer(positions, self.base ** (-pairs / self.head_dim))
        dtype = accumulation_dtype(self.anchor.dtype)
        return {"cos": torch.cos(angle).to(dtype), "sin": torch.sin(angle).to(dtype)}

    def forward(self, positions: Tensor) -> Rotary:
        """Rows of the tables for absolute positions (...): (..., dz/2) each."""
        table = self.constants()
        slots = positions % self.chunk_size
        return Rotary(table["cos"][slots], table["sin"][slots])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (j, j + dz/2) of the last dimension of x by the given angles (half-split layout)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def masked_softmax(
    scores: Tensor, allowed: Tensor, dtype: torch.dtype, dropout: float = 0.0, drop_key: bool = False
) -> Tensor:
    """softmax of the allowed scores, computed in float32 or better, with dropout of weights or (DropKey) of keys."""
    scores = cast(scores, accumulation_dtype(scores.dtype))
    # not training=dropout > 0: torch.compile(dynamic=True) makes a symbol of the rate
    if dropout > 0 and drop_key:  # before the softmax, so what is left sums to 1; a query may lose every key
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

    With a cache, over the ring as well, which it does not change; without one every row starts at position 0.
    """
    if not plan.single:
        return _attend_in_blocks(q, k, v, plan, cache, chunk, dropout, drop_key)
    heads, length, before = q.shape[:2], q.shape[2], 0
    time = plan.time.expand(q.shape[0], -1)
    if cache is not None:
        before = plan.ring_time.shape[1]
        k, v = (torch.cat([first(ring, 2, before), new], dim=2) for ring, new in ((cache.key, k), (cache.value, v)))
        time = torch.cat([plan.ring_time, time], dim=1)
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    parts = PARTS if guard_or_false(length % PARTS == 0) else 1
    size, out = length // parts, []
    for part in range(parts):  # each over the keys up to its own last
        start, end = part * size, before + (part + 1) * size
        query_time, chunk_start = plan.time.narrow(0, start, size), plan.chunk_start.narrow(1, start, size)
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
    """The same in blocks of C queries over their own keys, with a cache over the C keys before those as well."""
    length = q.shape[2]
    q, k, v = (to_blocks(t, 2, chunk) for t in (q, k, v))  # (B, H, blocks, C, d)
    query_time, chunk_start = (t.unflatten(-1, (-1, chunk)) for t in (plan.time, plan.chunk_start))
    key_time = query_time.expand(q.shape[0], -1, -1)
    if cache is not None:
        k, v = _behind(cache.key, k, 2), _behind(cache.value, v, 2)  # (B, H, blocks, 2C, d)
        key_time = _behind(plan.ring_time, key_time, 1)
    allowed = visible(key_time, query_time, chunk_start)[:, None]
    weights = masked_softmax(batched_matmul(q, k.mT), allowed, v.dtype, dropout, drop_key)
    return from_blocks(batched_matmul(weights, v), 2, length)


def _behind(ring: Tensor, blocks: Tensor, dim: int) -> Tensor:
    """Put before each of the blocks in `dim` the one that precedes it, before the first the ring."""
    previous = blocks.narrow(dim, 0, blocks.shape[dim] - 1)
    return torch.cat([torch.cat([ring.unsqueeze(dim), previous], dim=dim), blocks], dim=dim + 1)


def write_ring(ring: Tensor, new: Tensor, plan: PrefillPlan) -> None:
    """Write the last (up to C) of each row's valid new tokens (B, H, L, d) into the ring (B, H, C, d), in place."""
    if not plan.single:
        new = F.pad(new, (0, 0, 0, ring.shape[2]))  # so that a gather of C tokens is in range for any L
    rows = plan.rows[:, None]
    # aten's index: the indexing syntax would add guards on the batch to an exported graph
    kept = torch.ops.aten.index(ring, [rows, None, plan.ring_slots])  # (B, size, H, d)
    taken = torch.ops.aten.index(new, [rows, None, plan.ring_index])
    torch.ops.aten.index_put_(ring, [rows, None, plan.ring_slots], torch.where(plan.ring_valid, taken, kept))


def attend_step(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, position: Tensor) -> Tensor:
    """Attention of one token: q, k (B, H, dz), v (B, H, dv) -> (B, H, dv). Writes its slot of the ring, in place."""
    chunk = cache.key.shape[2]
    rows = torch.arange(q.shape[0], device=q.device)
    slot = position % chunk
    torch.ops.aten.index_put_(cache.key, [rows, None, slot], k)
    torch.ops.aten.index_put_(cache.value, [rows, None, slot], v)
    allowed = torch.arange(chunk, device=q.device) <= slot[:, None]  # (B, C)
    scores = batched_matmul(q[:, :, None], cache.key.mT)  # (B, H, 1, C)
    weights = masked_softmax(scores, allowed[:, None, None], cache.value.dtype)
    return batched_matmul(weights, cache.value)[:, :, 0]


class GatedAttention(nn.Module):
    """Moving average gated attention: x + h of `block(x)`, with the names of the original's parameters."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        dim, z, e = config.model_dim, config.z_dim, config.value_dim
        self.heads, self.chunk = config.num_heads, config.chunk_size
        self.horizon = config.kv_horizon
        self.dropout, self.attention_dropout = config.dropout, config.attention_dropout
        self.hidden_dropout, self.drop_key = config.hidden_dropout, config.drop_key
        self.timenorm = TimestepNorm(dim, config.norm_num_groups, config.norm_eps, config.norm_statistics)
        self.cema = ComplexEMA(dim, config.cema_ndim, config.ema_prefill)
        self.rmsnorm = RMSNorm(dim if config.norm_affine else None, config.norm_eps)
        self.znorm = RMSNorm(None, config.norm_eps)
        self.wz = nn.Linear(dim, z)
        self.wv = nn.Linear(dim, e)
        self.wr = nn.Linear(dim, e)
        self.wh1 = nn.Linear(dim, dim)
        self.wh2 = nn.Linear(e, dim, bias=config.projection_bias)
        self.gamma = nn.Parameter(torch.zeros(2, z))
        self.beta = nn.Parameter(torch.zeros(2, z))

    def forward(
        self, x: Tensor, plan: PrefillPlan, rotary: Rotary, cache: LayerCache | None, relay: Relay | None = None
    ) -> tuple[Tensor, NormState, Tensor]:
        """x (B, L, D) -> x + h, new norm state, new EMA state. Key and value of the cache are updated in place."""
        norm, ema = self._states(cache, x)
        if relay is not None:
            states = (*norm, self.cema.initial_state(x) if ema is None else ema)
            *norm_state, ema = relay.receive(self, states, x, self.timenorm, self.cema)
            norm = NormState(*norm_state)
        x_norm, norm = self.timenorm(x, plan, norm)
        y, ema = self.cema(x_norm, plan, ema)
        if relay is not None:
            y = relay.send(self, y, (*norm, ema))
        m, q, k, v = self._project(x_norm, y, rotary)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, L, d)
        dropout = self.attention_dropout if self.training else 0.0
        if cache is not None and self.horizon is not None:
            from .horizon import attend_and_write

            o = attend_and_write(q, k, v, plan, cache, self.horizon, self.chunk, dropout, self.drop_key)
        else:
            o = attend_prefill(q, k, v, plan, cache, self.chunk, dropout, self.drop_key)
            if cache is not None:
                write_ring(cache.key, k.detach(), plan)
                write_ring(cache.value, v.detach(), plan)
        return self._gate(x, m, o.transpose(1, 2)), norm, ema

    def step(self, x: Tensor, position: Tensor, rotary: Rotary, cache: LayerCache) -> tuple[Tensor, NormState, Tensor]:
        """One token, x (B, D); otherwise as `forward`."""
        x_norm, norm = self.timenorm.step(x, position, NormState(cache.norm_mean, cache.norm_var))
        y, ema = self.cema.step(x_norm, cache.ema_state)
        m, q, k, v = self._project(x_norm, y, rotary)
        return self._gate(x, m, attend_step(q, k, v, cache, position)), norm, ema

    def _states(self, cache: LayerCache | None, x: Tensor) -> tuple[NormState, Tensor | None]:
        if cache is None:
            return self.timenorm.initial_state(x.shape[0], x.device), None
        return NormState(cache.norm_mean, cache.norm_var), cache.ema_state

    def _project(self, x_norm: Tensor, y: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """m (..., D) and per head q, k (..., H, dz), v (..., H, dv), from the norm's and the EMA's output."""
        m = self._drop(cast(self.rmsnorm(y), x_norm.dtype), self.hidden_dropout)
        z = self.znorm(self.wz(m).unflatten(-1, (self.heads, -1)))  # (..., H, dz), accumulation dtype
        scale = (cast(self.gamma, z.dtype) + 1) / math.sqrt(z.shape[-1])
        rows = (2, *[1] * (z.dim() - 2), self.heads, z.shape[-1])  # query and key first, so that each is contiguous
        cos, sin = (t[..., None, :] for t in rotary)
        q, k = cast(rotate(z * scale.view(rows) + cast(self.beta, z.dtype).view(rows), cos, sin), x_norm.dtype)
        v = F.silu(self.wv(x_norm)).unflatten(-1, (self.heads, -1))
        return m, q, k, v

    def _gate(self, x: Tensor, m: Tensor, o: Tensor) -> Tensor:
        gated = self._drop(compact(o).flatten(-2) * F.silu(self.wr(m)), self.hidden_dropout)
        return x + self._drop(self.wh1(m) + self.wh2(gated), self.dropout)

    def _drop(self, x: Tensor, rate: float) -> Tensor:
        return F.dropout(x, rate) if self.training else x
