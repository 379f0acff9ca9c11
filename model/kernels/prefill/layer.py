"""One layer of a prefill on the kernels of this folder; `model/blocks.py: MegalodonBlock` is the plain form."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from ...cache import LayerCache
from ..layer_norm import sum_norm
from .attention import attend_chunks
from .ema import ema_scan
from .norms import timestep_norm_

if TYPE_CHECKING:
    from ...feed_forward import FeedForward
    from ...gated_attention import GatedAttention
    from ...rotary import Rotary


def layer_prefill(
    attn: GatedAttention,
    ffn: FeedForward,
    x: Tensor,
    lengths: Tensor,
    position: Tensor,
    rotary: Rotary,
    cache: LayerCache,
) -> Tensor:
    """New tokens of each row through a layer, x (B, L, D) -> (B, L, D); the layer's cache changes in place."""
    c = attn.cema.constants()
    x_norm = timestep_norm_(attn.timenorm, x, lengths, position, cache.norm_mean, cache.norm_var)
    m = ema_scan(
        *(x_norm, lengths, cache.ema_state, c["scan_coefficients"], c["omega"], attn.rmsnorm.weight, attn.rmsnorm.eps)
    )
    v = F.silu(attn.wv(x_norm))
    gated = attend_chunks(
        *(attn.wz(m), v, attn.wr(m), attn.gamma, attn.beta, lengths, position, *rotary),
        *(cache.key, cache.value, attn.znorm.eps),
    )
    n = sum_norm(attn.wh1(m), attn.wh2(gated), x, ffn.norm.weight, ffn.norm.bias, ffn.norm.eps)
    hidden = F.silu(ffn.fc1(n))
    if ffn.fc3 is not None:
        hidden = hidden * ffn.fc3(n)
    out = ffn.fc2(hidden)
    return x + (out if ffn.alpha is None else ffn.alpha * out)
