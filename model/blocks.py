"""A Megalodon block: gated attention, then a feed-forward network whose residual is the block's input (two-hop).

h = x + GatedAttention(x)        y = x + FFN(LayerNorm(h))        (arXiv 2404.08801, section 3.5)
"""

from __future__ import annotations

from torch import Tensor, nn

from .cache import LayerCache
from .config import ModelConfig
from .feed_forward import FeedForward
from .gated_attention import GatedAttention
from .plan import PrefillPlan
from .rotary import Rotary


class MegalodonBlock(nn.Module):
    """One layer of the model."""

    attention_class: type[GatedAttention] = GatedAttention

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attn = self.attention_class(config)
        self.ffn = FeedForward(config, layer)

    def forward(self, x: Tensor, plan: PrefillPlan, rotary: Rotary, cache: LayerCache | None) -> Tensor:
        """New tokens: x (B, L, D) -> (B, L, D). The layer's cache is updated in place."""
        return self.ffn(self.attn(x, plan, rotary, cache), x)  # type: ignore[no-any-return]

    def step(self, x: Tensor, position: Tensor, rotary: Rotary, cache: LayerCache) -> Tensor:
        """One token of each row: x (B, D) -> (B, D). The layer's cache is updated in place."""
        return self.ffn(self.attn.step(x, position, rotary, cache), x)  # type: ignore[no-any-return]
