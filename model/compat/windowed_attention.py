"""Attention beyond the chunk, as megalodon-hf has it in cached calls with `max_cache_len` or `cache_unbounded`.

A call of up to C tokens is one block; a longer one is cut into blocks of C. The queries of a block see the last W keys
up to its end, those of earlier calls included. So what a finite window shows depends on how a text is split into calls;
an unbounded window does not. Passes without a cache stay inside chunks. Exported programs attend inside chunks alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..attention import masked_softmax, write_ring
from ..cache import LayerCache, ModelCache
from ..config import ModelConfig
from ..gated_attention import GatedAttention
from ..modeling import Observer
from ..norm import accumulation_dtype
from ..plan import PrefillPlan
from ..rotary import Rotary, RotaryTable
from ..transformers_api.blocks import MegalodonDecoderLayer
from ..transformers_api.modeling import MegalodonModel


class AbsoluteRotary(RotaryTable):
    """Cosines and sines of absolute positions, which keys of different chunks need; angles in float64, no table."""

    def derive(self) -> dict[str, Tensor]:
        """Nothing: a stream has no last position."""
        return {}

    def forward(self, positions: Tensor) -> Rotary:
        """Absolute positions (...) -> cosines and sines (..., dz/2)."""
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=positions.device)
        angle = positions.double()[..., None] * self.base ** (-pairs / self.head_dim)
        dtype = accumulation_dtype(self.anchor.dtype)
        return Rotary(torch.cos(angle).to(dtype), torch.sin(angle).to(dtype))


class WindowedAttention(GatedAttention):
    """Gated attention whose queries see the last `window` keys in cached calls."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.window = math.inf if config.attention_window is None else config.attention_window

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: PrefillPlan, cache: LayerCache | None) -> Tensor:
        """q, k (B, L, H, dz), v (B, L, H, dv) -> (B, L, H, dv); with a cache, over its ring and the new tokens."""
        if cache is None:
            return super().attend(q, k, v, plan, cache)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, L, d)
        length = q.shape[2]
        ring_time = _ring_time(plan, cache.slots, length)
        starts = range(0, length, self.chunk)
        out = [self._attend_block(q, k, v, plan, cache, ring_time, start) for start in starts]
        write_ring(cache.key, k.detach(), plan)
        write_ring(cache.value, v.detach(), plan)
        return torch.cat(out, dim=2).transpose(1, 2)

    def _attend_block(
        self, q: Tensor, k: Tensor, v: Tensor, plan: PrefillPlan, cache: LayerCache, ring_time: Tensor, start: int
    ) -> Tensor:
        """The queries from `start` on, up to C of them. Times count from the call's first token."""
        stop = min(start + self.chunk, q.shape[2])
        oldest = max(int(max(start + 1 - self.window, 0)), 0)  # of the new keys
        keys, values = k[:, :, oldest:stop], v[:, :, oldest:stop]
        time = torch.arange(oldest, stop, device=q.device).expand(q.shape[0], -1)
        if start + 1 - self.window < 0:
            keys, values = torch.cat([cache.key, keys], dim=2), torch.cat([cache.value, values], dim=2)
            time = torch.cat([ring_time, time], dim=1)
        query_time = torch.arange(start, stop, device=q.device)
        end = plan.tokens.lengths.clamp(max=stop)[:, None]  # of the row's block
        allowed = (time[:, None] <= query_time[:, None]) & (time >= end - self.window)[:, None]  # (B, Q, K)
        scores = q[:, :, start:stop] @ keys.mT
        return masked_softmax(scores, allowed[:, None], v.dtype, self._attention_dropout, self.drop_key) @ values


class WindowedDecoderLayer(MegalodonDecoderLayer):
    """A layer with `WindowedAttention`."""

    attention_class = WindowedAttention


class WindowedModel(MegalodonModel):
    """The model of a config with `max_cache_len` or `cache_unbounded`; `MegalodonModel(config)` makes it."""

    block_class = WindowedDecoderLayer
    rotary_class = AbsoluteRotary

    def prefill(
        self,
        token_ids: Tensor,
        lengths: Tensor,
        cache: ModelCache | None = None,
        max_length: int | None = None,
        observe: Observer | None = None,
    ) -> Tensor:
        """As `Megalodon.prefill`; the rings of an unbounded cache grow first."""
        if cache is not None and self.config.cache_unbounded:
            reserve(cache, int((cache.position + lengths).max()))
        return super().prefill(token_ids, lengths, cache, max_length, observe)

    def decode(self, token_ids: Tensor, cache: ModelCache, observe: Observer | None = None) -> Tensor:
        """A prefill of one token."""
        return self.prefill(token_ids[:, None], torch.ones_like(token_ids), cache, observe=observe)[:, 0]


def reserve(cache: ModelCache, tokens: int) -> None:
    """Give every ring room for `tokens` tokens, by at least half as much again."""
    for layer in cache.layers:
        slots = layer.slots
        if slots < tokens:
            more = max(tokens, slots + slots // 2) - slots
            layer.key, layer.value = (torch.nn.functional.pad(t, (0, 0, 0, more)) for t in (layer.key, layer.value))


def _ring_time(plan: PrefillPlan, slots: int, length: int) -> Tensor:
    """The time of each slot's token, (B, slots); `length`, after every query, for a slot without one."""
    position = plan.tokens.position[:, None]
    age = (torch.arange(slots, device=position.device) - position) % slots - slots  # -1 is the last token
    return torch.where(age >= -position, age, length)
