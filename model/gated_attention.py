"""The block that combines attention inside chunks with the complex EMA."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend_prefill, attend_step, write_ring
from .blocking import compact
from .cache import LayerCache
from .compat.horizon import attend_and_write
from .config import MegalodonConfig
from .ema import ComplexEMA
from .norm import NormState, RMSNorm, TimestepNorm, cast
from .plan import PrefillPlan
from .rotary import Rotary, rotate

if TYPE_CHECKING:
    from .distributed.sequence_state import Relay


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
        # The EMA leaves time last. Three products follow, and each would make a copy of its own of such a view.
        m, q, k, v = self._project(x_norm, compact(y), rotary)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, L, d)
        dropout = self.attention_dropout if self.training else 0.0
        if cache is not None and self.horizon is not None:
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
