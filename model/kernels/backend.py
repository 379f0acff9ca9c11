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
        """token_ids, position (B) -> scaled embeddings x (B, D) and rotary angles (B, dz/2), in one kernel."""
        if model.training:
            return super().begin_step(model, token_ids, position)
        angles = model.rotary.constants()
        tables = model.embed.weight, angles["cos"], angles["sin"]
        x, cos, sin = embed_tokens(token_ids, position, *tables, model.embedding_scale)
        return x, Rotary(cos, sin)

    def prefill_layer(
        self, layer: MegalodonBlock, x: Tensor, plan: PrefillPlan, rotary: Rotary, cache: LayerCache | None
    ) -> Tensor:
        """A layer over new tokens, x (B, L, D) -> (B, L, D). The kernels update the layer's cache in place."""
        if cache is None or layer.training:
            return super().prefill_layer(layer, x, plan, rotary, cache)
        tokens = plan.tokens
        return layer_prefill(layer.attn, layer.ffn, x, tokens.lengths, tokens.position, rotary, cache)

    def step_layer(
        self, layer: MegalodonBlock, x: Tensor, position: Tensor, rotary: Rotary, cache: LayerCache
    ) -> Tensor:
        """A layer over one token of each row, x (B, D) -> (B, D). The kernels update the layer's cache in place."""
        if layer.training:
            return super().step_layer(layer, x, position, rotary, cache)
        return layer_step(layer.attn, layer.ffn, x, position, rotary, cache)

    def prefill_norm(self, norm: TimestepNorm, x: Tensor, plan: PrefillPlan, cache: FinalCache | None) -> Tensor:
        """The final norm over new tokens, x (B, L, D) -> (B, L, D). It updates the cached statistics in place."""
        if cache is None or norm.training:
            return super().prefill_norm(norm, x, plan, cache)
        return timestep_norm_(norm, x, plan.tokens.lengths, plan.tokens.position, cache.norm_mean, cache.norm_var)

    def step_norm(self, norm: TimestepNorm, x: Tensor, cache: FinalCache) -> Tensor:
        """The final norm over one token of each row, x (B, D) -> (B, D). It moves the cached position on by one."""
        if norm.training:
            return super().step_norm(norm, x, cache)
        states = cache.position, cache.norm_mean, cache.norm_var
        return final_norm(x, *states, norm.weight, norm.bias, norm.eps, norm.statistics == "megalodon-hf")

    def head(self, head: nn.Module, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) -> logits (..., V) in float32. The kernel takes (B, D) alone."""
        if head.training or hidden.dim() != 2:
            return super().head(head, hidden)
        return linear(hidden, *linear_tensors(head), None, None, None, torch.float32)

    def write_next_tokens(self, logits: Tensor, next_tokens: Tensor) -> None:
        """Write the most probable tokens of logits (B, V), and their logit errors, into next_tokens (2, B)."""
        argmax(logits, next_tokens)
