"""A Megalodon block: gated attention, then a feed-forward network whose residual is the block's input (two-hop)."""

from __future__ import annotations

from torch import Tensor, nn

from .attention import GatedAttention, Rotary
from .cache import LayerCache
from .config import MegalodonConfig
from .feed_forward import FeedForward
from .norm import NormState
from .plan import PrefillPlan


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

            return layer_prefill(self.attn, self.ffn, x, plan.lengths, plan.position, rotary, cache)
        h, norm, ema = self.attn(x, plan, rotary, cache)
        if cache is not None:
            _store(cache, norm, ema)
        return self.ffn(h, x)

    def step(self, x: Tensor, position: Tensor, rotary: Rotary, cache: LayerCache) -> Tensor:
        """One token, x (B, D) -> (B, D); otherwise as `forward`."""
        if self.kernels and not self.training:
            from .kernels.step import layer_step

            return layer_step(self.attn, self.ffn, x, position, rotary, cache)
        h, norm, ema = self.attn.step(x, position, rotary, cache)
        _store(cache, norm, ema)
        return self.ffn(h, x)


def _store(cache: LayerCache, norm: NormState, ema: Tensor) -> None:
    """Write a layer's new small states into its cache, in place; not part of the autograd graph."""
    norm.store(cache)
    cache.ema_state.copy_(ema.detach())
