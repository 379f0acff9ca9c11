"""A Megalodon block: gated attention, then a feed-forward network whose residual is the block's input (two-hop)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import GatedAttention, Rotary
from .cache import LayerCache
from .config import MegalodonConfig
from .norm import LayerNorm, NormState
from .plan import PrefillPlan


class FeedForward(nn.Module):
    """residual + alpha * W2 silu(W1 norm(h)), or W2 (silu(W1 .) * W3 .) with swiglu."""

    def __init__(self, config: MegalodonConfig, layer: int) -> None:
        super().__init__()
        dim, hidden, bias = config.model_dim, config.ffn_hidden_dim, config.projection_bias
        self.dropout, self.hidden_dropout = config.dropout, config.hidden_dropout
        self.norm = LayerNorm(dim, config.norm_eps, config.norm_affine)
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.fc3 = nn.Linear(dim, hidden, bias=bias) if config.swiglu else None
        self.fc2 = nn.Linear(hidden, dim, bias=bias)
        self.initial_alpha = 0.1 * 0.5**layer
        self.alpha = nn.Parameter(torch.full((dim,), self.initial_alpha)) if config.rescale_nffn else None

    def forward(self, h: Tensor, residual: Tensor) -> Tensor:
        """h, residual (..., D) -> (..., D)."""
        h = self.norm(h)
        hidden = F.silu(self.fc1(h))
        if self.fc3 is not None:
            hidden = hidden * self.fc3(h)
        if self.training:
            hidden = F.dropout(hidden, self.hidden_dropout)
        out = self.fc2(hidden)
        if self.training:
            out = F.dropout(out, self.dropout)
        return residual + (out if self.alpha is None else self.alpha * out)


class MegalodonBlock(nn.Module):
    """One layer of the model."""

    def __init__(self, config: MegalodonConfig, layer: int) -> None:
        super().__init__()
        self.attn = GatedAttention(config)
        self.ffn = FeedForward(config, layer)
        self.kernels = False  # see `use_kernels`

    def forward(self, x: Tensor, plan: PrefillPlan, rotary: Rotary, cache: LayerCache | None) -> Tensor:
        """x (B, L, D) -> (B, L, D); the layer's cache is updated in place."""
        if self.kernels and cache is not None and not self.training:
            from .kernels.prefill import layer_prefill

            return layer_prefill(self, x, plan.lengths, plan.position, rotary, cache)
        h, norm, ema = self.attn(x, plan, rotary, cache)
        if cache is not None:
            _store(cache, norm, ema)
        return self.ffn(h, x)

    def step(self, x: Tensor, position: Tensor, rotary: Rotary, cache: LayerCache) -> Tensor:
        """One token, x (B, D) -> (B, D); otherwise as `forward`."""
        if self.kernels and not self.training:
            from .kernels.step import layer_step

            return layer_step(self, x, position, rotary, cache)
        h, norm, ema = self.attn.step(x, position, rotary, cache)
        _store(cache, norm, ema)
        return self.ffn(h, x)


def _store(cache: LayerCache, norm: NormState, ema: Tensor) -> None:
    """Write a layer's new small states into its cache, in place; not part of the autograd graph."""
    norm.store(cache)
    cache.ema_state.copy_(ema.detach())
