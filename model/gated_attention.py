"""Moving average equipped gated attention (arXiv 2404.08801, section 3; names of the original's parameters).

x' = TimestepNorm(x)              y = CEMA(x')                       m = RMSNorm(y)
z  = wz m, each head over its root mean square                       v = silu(wv x')
q  = rotary((gamma_0 + 1) / sqrt(dz) z + beta_0)                     k = rotary((gamma_1 + 1) / sqrt(dz) z + beta_1)
o  = softmax(q k^T) v, inside chunks of C tokens
h  = wh1 m + wh2 (o * silu(wr m))                                    returns x + h

Each head of z has a root mean square of 1, so its length is sqrt(dz). The factor 1 / sqrt(dz) makes it 1, in q as in k.
So q k^T has no factor of its own.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend_prefill, attend_step, write_ring
from .blocking import compact
from .cache import LayerCache
from .config import ModelConfig
from .ema import ComplexEMA
from .norm import NormState, RMSNorm, TimestepNorm, cast
from .plan import PrefillPlan
from .rotary import Rotary, rotate


class GatedAttention(nn.Module):
    """The first half of a block: D features of a token, E of its value, Z of its query and key, H heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, z, e = config.model_dim, config.z_dim, config.value_dim
        self.heads, self.chunk = config.num_heads, config.chunk_size
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

    def forward(self, x: Tensor, plan: PrefillPlan, rotary: Rotary, cache: LayerCache | None) -> Tensor:
        """New tokens: x (B, L, D) -> x + h (B, L, D). The layer's cache is updated in place."""
        x_norm, y, norm, ema = self.recurrence(x, plan, *self.states(x, cache))
        out = self.behind_recurrence(x, x_norm, y, plan, rotary, cache)
        if cache is not None:
            cache.store_states(*norm, ema)
        return out

    def behind_recurrence(
        self, x: Tensor, x_norm: Tensor, y: Tensor, plan: PrefillPlan, rotary: Rotary, cache: LayerCache | None
    ) -> Tensor:
        """x + h (B, L, D) from what `recurrence` gives; attention alone looks at other tokens, and fills the rings."""
        m, q, k, v = self.project(x_norm, compact(y), rotary)  # one copy of y here, not one in each product
        return self.gate(x, m, self.attend(q, k, v, plan, cache))

    def step(self, x: Tensor, position: Tensor, rotary: Rotary, cache: LayerCache) -> Tensor:
        """One token of each row: x (B, D) -> x + h (B, D). The layer's cache is updated in place."""
        x_norm, norm = self.timenorm.step(x, position, NormState(cache.norm_mean, cache.norm_var))
        y, ema = self.cema.step(x_norm, cache.ema_state)
        m, q, k, v = self.project(x_norm, y, rotary)
        out = self.gate(x, m, attend_step(q, k, v, cache, position))
        cache.store_states(*norm, ema)
        return out

    def states(self, x: Tensor, cache: LayerCache | None) -> tuple[NormState, Tensor | None]:
        """The states before the first token of x: the cache's, or those of a fresh stream (None: zero)."""
        if cache is None:
            return self.timenorm.initial_state(x.shape[0], x.device), None
        return NormState(cache.norm_mean, cache.norm_var), cache.ema_state

    def recurrence(
        self, x: Tensor, plan: PrefillPlan, norm: NormState, ema: Tensor | None
    ) -> tuple[Tensor, Tensor, NormState, Tensor]:
        """TimestepNorm and CEMA, the two parts that see the whole text, from the states before x.

        Returns x' and y (B, L, D), and the states of both after each row's last valid token.
        """
        x_norm, norm = self.timenorm(x, plan, norm)
        y, ema = self.cema(x_norm, plan, ema)
        return x_norm, y, norm, ema

    def project(self, x_norm: Tensor, y: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """From x' and y: m (..., D), and for each head q, k (..., H, dz) and v (..., H, dv)."""
        m = self._drop(cast(self.rmsnorm(y), x_norm.dtype), self.hidden_dropout)
        z = self.znorm(self.wz(m).unflatten(-1, (self.heads, -1)))  # (..., H, dz), accumulation dtype
        scale = (cast(self.gamma, z.dtype) + 1) / math.sqrt(z.shape[-1])
        rows = (2, *[1] * (z.dim() - 2), self.heads, z.shape[-1])  # query and key first, so that each is contiguous
        cos, sin = (t[..., None, :] for t in rotary)
        q, k = cast(rotate(z * scale.view(rows) + cast(self.beta, z.dtype).view(rows), cos, sin), x_norm.dtype)
        v = F.silu(self.wv(x_norm)).unflatten(-1, (self.heads, -1))
        return m, q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: PrefillPlan, cache: LayerCache | None) -> Tensor:
        """Attention of new tokens: q, k (B, L, H, dz), v (B, L, H, dv) -> (B, L, H, dv). The rings take k and v."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, L, d)
        o = attend_prefill(q, k, v, plan, cache, self.chunk, self._attention_dropout, self.drop_key)
        if cache is not None:
            write_ring(cache.key, k.detach(), plan)
            write_ring(cache.value, v.detach(), plan)
        return o.transpose(1, 2)

    def gate(self, x: Tensor, m: Tensor, o: Tensor) -> Tensor:
        """x + h from m (..., D) and attention's output (..., H, dv)."""
        gated = self._drop(compact(o).flatten(-2) * F.silu(self.wr(m)), self.hidden_dropout)
        return x + self._drop(self.wh1(m) + self.wh2(gated), self.dropout)

    @property
    def _attention_dropout(self) -> float:
        return self.attention_dropout if self.training else 0.0

    def _drop(self, x: Tensor, rate: float) -> Tensor:
        return F.dropout(x, rate) if self.training else x
