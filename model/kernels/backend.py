"""The Triton kernels as a back end of the model, for CUDA GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..backend import Backend
from ..cache import FinalCache, LayerCache
from ..norm import TimestepNorm
from ..plan import PrefillPlan
from ..rotary import Rotary
from .decode.argmax import argmax
from .decode.embedding import embed_tokens
from .decode.final_norm import final_norm
from .decode.layer import layer_step
from .decode.linear import linear
from .decode.weights import linear_tensors
from .prefill.layer import layer_prefill
from .prefill.norms import timestep_norm_

if TYPE_CHECKING:
    from ..blocks import MegalodonBlock
    from ..modeling import Megalodon


class KernelBackend(Backend):
    """Inference over a cache runs on the kernels. Passes without a cache, and training, keep the plain form."""

    writes_next_tokens = True

    def begin_step(self, model: Megalodon, token_ids: Tensor, position: Tensor) -> tuple[Tensor, Rotary]:
        """See `Backend`."""
        if model.training:
            return super().begin_step(model, token_ids, position)
        angles = model.rotary.constants()
        tables = model.embed.weight, angles["cos"], angles["sin"]
        x, cos, sin = embed_tokens(token_ids, position, *tables, model.embedding_scale)
        return x, Rotary(cos, sin)

    def prefill_layer(
        self, layer: MegalodonBlock, x: Tensor, plan: PrefillPlan, rotary: Rotary, cache: LayerCache | None
    ) -> Tensor:
        """See `Backend`."""
        if cache is None or layer.training:
            return super().prefill_layer(layer, x, plan, rotary, cache)
        tokens = plan.tokens
        return layer_prefill(layer.attn, layer.ffn, x, tokens.lengths, tokens.position, rotary, cache)

    def step_layer(
        self, layer: MegalodonBlock, x: Tensor, position: Tensor, rotary: Rotary, cache: LayerCache
    ) -> Tensor:
        """See `Backend`."""
        if layer.training:
            return super().step_layer(layer, x, position, rotary, cache)
        return layer_step(layer.attn, layer.ffn, x, position, rotary, cache)

    def prefill_norm(self, norm: TimestepNorm, x: Tensor, plan: PrefillPlan, cache: FinalCache | None) -> Tensor:
        """See `Backend`."""
        if cache is None or norm.training:
            return super().prefill_norm(norm, x, plan, cache)
        return timestep_norm_(norm, x, plan.tokens.lengths, plan.tokens.position, cache.norm_mean, cache.norm_var)

    def step_norm(self, norm: TimestepNorm, x: Tensor, cache: FinalCache) -> Tensor:
        """See `Backend`."""
        if norm.training:
            return super().step_norm(norm, x, cache)
        states = cache.position, cache.norm_mean, cache.norm_var
        return final_norm(x, *states, norm.weight, norm.bias, norm.eps, norm.statistics == "megalodon-hf")

    def head(self, head: nn.Module, hidden: Tensor) -> Tensor:
        """See `Backend`; the kernel takes one hidden state of each row."""
        if head.training or hidden.dim() != 2:
            return super().head(head, hidden)
        return linear(hidden, *linear_tensors(head), None, None, None, torch.float32)

    def write_next_tokens(self, logits: Tensor, next_tokens: Tensor) -> None:
        """See `Backend`."""
        argmax(logits, next_tokens)
