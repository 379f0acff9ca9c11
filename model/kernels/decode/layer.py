"""One layer of a decode step on the kernels of this folder; `model/blocks.py: MegalodonBlock` is the plain form."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...cache import LayerCache
from .attention import attend
from .ema import ema_step
from .linear import linear
from .projections import project
from .up_projection import up_projection
from .weights import linear_tensors

if TYPE_CHECKING:
    from ...feed_forward import FeedForward
    from ...gated_attention import GatedAttention
    from ...rotary import Rotary


def layer_step(
    attn: GatedAttention, ffn: FeedForward, x: Tensor, position: Tensor, rotary: Rotary, cache: LayerCache
) -> Tensor:
    """One token a row through a layer, x (B, D) -> (B, D); the layer's cache changes in place."""
    c = attn.cema.constants()
    norm = attn.timenorm
    x_norm, scaled, squares = ema_step(
        *(x, position, cache.norm_mean, cache.norm_var, cache.ema_state, norm.weight, norm.bias),
        *(c["p"], c["q"], c["gamma"], c["omega"], attn.rmsnorm.weight, norm.eps, norm.statistics == "megalodon-hf"),
    )
    projections = [tensor for w in (attn.wz, attn.wr, attn.wh1, attn.wv) for tensor in linear_tensors(w)]
    z, r, h1 = project(x_norm, scaled, squares, position, *projections, cache.value, attn.rmsnorm.eps)
    cos, sin = rotary
    gated = attend(z, r, attn.gamma, attn.beta, position, cos, sin, cache.key, cache.value, attn.znorm.eps)
    h = linear(gated, *linear_tensors(attn.wh2), None, h1, x, torch.float32)
    fc1, fc3 = linear_tensors(ffn.fc1), linear_tensors(ffn.fc3)
    hidden = up_projection(h, ffn.norm.weight, ffn.norm.bias, *fc1, *fc3, ffn.norm.eps, x.dtype)
    return linear(hidden, *linear_tensors(ffn.fc2), ffn.alpha, x, None, x.dtype)
