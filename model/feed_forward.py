"""The feed-forward network of a block.

y = residual + alpha W2 silu(W1 n)                     n = LayerNorm(h); alpha only with rescale_nffn
y = residual + alpha W2 (silu(W1 n) * W3 n)            with swiglu
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .norm import LayerNorm


class FeedForward(nn.Module):
    """The second half of a block; F hidden features."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
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
        """h, residual (..., D) -> (..., D). The residual is the block's input (two-hop)."""
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
