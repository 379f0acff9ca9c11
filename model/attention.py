"""Gated attention inside chunks: rotary positions, the ring cache, and the block that combines it with the CEMA."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocking import batched_matmul, compact, from_blocks, to_blocks
from .cache import LayerCache
from .config import MegalodonConfig
from .constants import DerivedConstants
from .ema import ComplexEMA
from .norm import NormState, RMSNorm, TimestepNorm, accumulation_dtype

MIN_SCORE = -1e30  # for masked scores: finite, so that a row without any valid key stays finite


class RotaryTable(DerivedConstants):
    """Cosines and sines (C, dz/2) of the positions inside a chunk, computed in float64."""

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

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the tables for absolute positions (...): (..., dz/2) each."""
        table = self.constants()
        slots = positions % self.chunk_size
        return table["cos"][slots], table["sin"][slots]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (j, j + dz/2) of the last dimension of x by the given angles (half-split layout)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def softmax_product(scores: Tensor, allowed: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax of the allowed scores (float32 or better), times v."""
    weights = torch.softmax(scores.to(accumulation_dtype(scores.dtype)).masked_fill(~allowed, MIN_SCORE), dim=-1)
    weights = weights.to(v.dtype)
    if dropout > 0:  # not training=dropout > 0: torch.compile(dynamic=True) makes a symbol of the rate
        weights = F.dropout(weights, dropout)
    return batched_matmul(weights, v)


def attend_fresh(q: Tensor, k: Tensor, v: Tensor, chunk: int, max_length: int, dropout: float) -> Tensor:
    """Causal attention inside chunks from position 0: q, k (B, H, L, dz), v (B, H, L, dv) -> (B, H, L, dv)."""
    length = q.shape[2]
    q, k, v = (_split(t, chunk, max_length) for t in (q, k, v))  # (B, H, chunks, size, d)
    steps = torch.arange(q.shape[3], device=q.device)
    out = softmax_product(batched_matmul(q, k.mT), steps[None, :] <= steps[:, None], v, dropout)
    return _join(out, length, chunk, max_length)


def attend_prefill(
    q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, position: Tensor, max_length: int, dropout: float
) -> Tensor:
    """Attention of L new tokens from any position, over the ring and themselves; shapes as in `attend_fresh`.

    Queries go in blocks of at most C, each over the C keys before it (for the first block: the ring) and its own:
    a chunk never reaches further back. Rows may stand at different positions.
    """
    length, chunk = q.shape[2], cache.key.shape[2]
    q, k, v = (_split(t, chunk, max_length) for t in (q, k, v))  # (B, H, blocks, size, d)
    k, v = (_behind(ring, t, max_length) for ring, t in ((cache.key, k), (cache.value, v)))  # (B, H, blocks, C + size, d)

    count, size = q.shape[2:4]
    offset = (position % chunk)[:, None, None, None]  # valid slots of the ring
    block = torch.arange(count, device=q.device)[:, None, None]
    key = torch.arange(chunk + size, device=q.device)
    query = block * size + torch.arange(size, device=q.device)[:, None]  # (blocks, size, 1): index among the new tokens
    new_key = (block - 1) * chunk + key  # index among the new tokens, unless the key is a slot of the ring
    in_ring = (block == 0) & (key < chunk)
    chunk_start = (offset + query) // chunk * chunk - offset  # (B, blocks, size, 1); negative: inside the ring
    allowed = torch.where(in_ring, (key < offset) & (chunk_start <= 0), (new_key <= query) & (new_key >= chunk_start))
    out = softmax_product(batched_matmul(q, k.mT), allowed[:, None], v, dropout)
    return _join(out, length, chunk, max_length)


def _split(x: Tensor, chunk: int, max_length: int) -> Tensor:
    """(B, H, L, d) -> (B, H, blocks, size, d): one block of L if no call is longer than a chunk, else blocks of C."""
    return x[:, :, None] if max_length <= chunk else to_blocks(x, 2, chunk)


def _join(x: Tensor, length: int, chunk: int, max_length: int) -> Tensor:
    return x[:, :, 0] if max_length <= chunk else from_blocks(x, 2, length)


def _behind(ring: Tensor, blocks: Tensor, max_length: int) -> Tensor:
    """Put before each block the C keys (or values) that precede it: the ring, or the block before."""
    previous = ring[:, :, None]
    if max_length > ring.shape[2]:
        previous = torch.cat([previous, blocks[:, :, :-1]], dim=2)
    return torch.cat([previous, blocks], dim=3)


def write_ring(ring: Tensor, new: Tensor, position: Tensor, lengths: Tensor, max_length: int) -> None:
    """Write the last (up to C) of each row's `lengths` valid new tokens (B, H, L, d) into the ring, in place."""
    chunk = ring.shape[2]
    size = new.shape[2] if max_length <= chunk else chunk
    if max_length > chunk:
        new = F.pad(new, (0, 0, 0, chunk))  # so that a gather of C tokens is in range for any L
    rows = torch.arange(ring.shape[0], device=ring.device)[:, None]
    index = (lengths[:, None] - size).clamp(min=0) + torch.arange(size, device=ring.device)  # (B, size)
    slots = (position[:, None] + index) % chunk  # distinct: size <= C
    valid = (index < lengths[:, None])[:, :, None, None]
    kept = torch.ops.aten.index(ring, [rows, None, slots])  # (B, size, H, d); the indexing syntax would add guards
    taken = torch.ops.aten.index(new, [rows, None, index])
    torch.ops.aten.index_put_(ring, [rows, None, slots], torch.where(valid, taken, kept))


def attend_step(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, position: Tensor) -> Tensor:
    """Attention of one token: q, k (B, H, dz), v (B, H, dv) -> (B, H, dv). Writes its slot of the ring, in place."""
    chunk = cache.key.shape[2]
    rows = torch.arange(q.shape[0], device=q.device)
    slot = position % chunk
    torch.ops.aten.index_put_(cache.key, [rows, None, slot], k)
    torch.ops.aten.index_put_(cache.value, [rows, None, slot], v)
    allowed = torch.arange(chunk, device=q.device) <= slot[:, None]  # (B, C)
    scores = batched_matmul(q[:, :, None], cache.key.mT)  # (B, H, 1, C)
    return softmax_product(scores, allowed[:, None, None], cache.value)[:, :, 0]


class GatedAttention(nn.Module):
    """Moving average gated attention: x + h of `block(x)`, with the names of the original's parameters."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        dim, z, e = config.model_dim, config.z_dim, config.value_dim
        self.heads, self.chunk = config.num_heads, config.chunk_size
        self.dropout, self.attention_dropout = config.dropout, config.attention_dropout
        self.hidden_dropout = config.hidden_dropout
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
        self,
        x: Tensor,
        lengths: Tensor,
        position: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: LayerCache | None,
        max_length: int,
    ) -> tuple[Tensor, NormState, Tensor]:
        """x (B, L, D) -> x + h, new norm state, new EMA state. Key and value of the cache are updated in place."""
        norm = self._norm_state(cache, x)
        x_norm, norm = self.timenorm(x, lengths, position, norm, max_length)
        y, ema = self.cema(x_norm, lengths, None if cache is None else cache.ema_state, max_length)
        m, q, k, v = self._project(x_norm, y, rotary)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, L, d)
        dropout = self.attention_dropout if self.training else 0.0
        if cache is None:
            o = attend_fresh(q, k, v, self.chunk, max_length, dropout)
        else:
            o = attend_prefill(q, k, v, cache, position, max_length, dropout)
            write_ring(cache.key, k.detach(), position, lengths, max_length)
            write_ring(cache.value, v.detach(), position, lengths, max_length)
        return self._gate(x, m, o.transpose(1, 2)), norm, ema

    def step(
        self, x: Tensor, position: Tensor, rotary: tuple[Tensor, Tensor], cache: LayerCache
    ) -> tuple[Tensor, NormState, Tensor]:
        """One token, x (B, D); otherwise as `forward`."""
        x_norm, norm = self.timenorm.step(x, position, NormState(cache.norm_mean, cache.norm_var))
        y, ema = self.cema.step(x_norm, cache.ema_state)
        m, q, k, v = self._project(x_norm, y, rotary)
        return self._gate(x, m, attend_step(q, k, v, cache, position)), norm, ema

    def _norm_state(self, cache: LayerCache | None, x: Tensor) -> NormState:
        if cache is None:
            return self.timenorm.initial_state(x.shape[0], x.device)
        return NormState(cache.norm_mean, cache.norm_var)

    def _project(
        self, x_norm: Tensor, y: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """m (..., D) and per head q, k (..., H, dz), v (..., H, dv), from the norm's and the EMA's output."""
        m = self._drop(self.rmsnorm(y).to(x_norm.dtype), self.hidden_dropout)
        z = self.znorm(self.wz(m).unflatten(-1, (self.heads, -1)))  # (..., H, dz), accumulation dtype
        scale = (self.gamma.to(z.dtype) + 1) / math.sqrt(z.shape[-1])
        cos, sin = (t[..., None, :] for t in rotary)
        q, k = (
            rotate(
                z * scale[i].unflatten(0, (self.heads, -1)) + self.beta[i].to(z.dtype).unflatten(0, (self.heads, -1)),
                cos,
                sin,
            )
            for i in range(2)
        )
        v = F.silu(self.wv(x_norm)).unflatten(-1, (self.heads, -1))
        return m, q.to(x_norm.dtype), k.to(x_norm.dtype), v

    def _gate(self, x: Tensor, m: Tensor, o: Tensor) -> Tensor:
        gated = self._drop(compact(o).flatten(-2) * F.silu(self.wr(m)), self.hidden_dropout)
        return x + self._drop(self.wh1(m) + self.wh2(gated), self.dropout)

    def _drop(self, x: Tensor, rate: float) -> Tensor:
        return F.dropout(x, rate, self.training)
