"""Attention beyond the chunk, as megalodon-hf has it in cached calls with `max_cache_len` or `cache_unbounded`.

A call of up to C tokens is one block, a longer one is cut into blocks of C. The queries of a block see the last
`kv_horizon` keys up to its end, those of earlier calls included; so a sliding horizon depends on how a text is split
into calls, an unbounded one does not. Passes without a cache stay inside chunks. In eager mode alone: the programs that
exporters compile attend inside chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import masked_softmax, write_ring
from ..cache import LayerCache, MegalodonCache
from ..norm import accumulation_dtype
from ..plan import PrefillPlan
from ..rotary import Rotary, RotaryTable


class AbsoluteRotary(RotaryTable):
    """Cosines and sines of absolute positions, which keys of different chunks need; angles in float64, no table."""

    def derive(self) -> dict[str, Tensor]:
        """Nothing: a stream has no last position."""
        return {}

    def forward(self, positions: Tensor) -> Rotary:
        """As `RotaryTable.forward`."""
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=positions.device)
        angle = positions.double()[..., None] * self.base ** (-pairs / self.head_dim)
        dtype = accumulation_dtype(self.anchor.dtype)
        return Rotary(torch.cos(angle).to(dtype), torch.sin(angle).to(dtype))


def reserve(cache: MegalodonCache, tokens: int) -> None:
    """Give every ring of an unbounded cache room for `tokens` tokens, by at least half as much again."""
    for layer in cache.layers:
        slots = layer.key.shape[2]
        if slots < tokens:
            more = max(tokens, slots + slots // 2) - slots
            layer.key, layer.value = (torch.nn.functional.pad(t, (0, 0, 0, more)) for t in (layer.key, layer.value))


def attend_and_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PrefillPlan,
    cache: LayerCache,
    horizon: float,
    chunk: int,
    dropout: float,
    drop_key: bool,
) -> Tensor:
    """q, k (B, H, L, dz), v (B, H, L, dv) -> (B, H, L, dv), over the ring and the new tokens, which it then takes.

    Times are relative to the call's first token. The plan is one for rings of this size.
    """
    length, slots = q.shape[2], cache.key.shape[2]
    age = (torch.arange(slots, device=q.device) - plan.position[:, None]) % slots - slots  # (B, S): -1 is the last
    ring_time = torch.where(age >= -plan.position[:, None], age, length)  # no token: after every query
    out = []
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        oldest = max(int(max(start + 1 - horizon, 0)), 0)  # of the new keys
        keys, values = k[:, :, oldest:stop], v[:, :, oldest:stop]
        time = torch.arange(oldest, stop, device=q.device).expand(q.shape[0], -1)
        if start + 1 - horizon < 0:
            keys, values = torch.cat([cache.key, keys], dim=2), torch.cat([cache.value, values], dim=2)
            time = torch.cat([ring_time, time], dim=1)
        query_time = torch.arange(start, stop, device=q.device)
        end = plan.lengths.clamp(max=stop)[:, None]  # of the row's block
        allowed = (time[:, None] <= query_time[:, None]) & (time >= end - horizon)[:, None]  # (B, Q, K)
        scores = q[:, :, start:stop] @ keys.mT
        out.append(masked_softmax(scores, allowed[:, None], v.dtype, dropout, drop_key) @ values)
    write_ring(cache.key, k.detach(), plan)
    write_ring(cache.value, v.detach(), plan)
    return torch.cat(out, dim=2)
