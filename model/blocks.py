"""A Megalodon block: gated attention, then a feed-forward network whose residual is the block's input (two-hop)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .cache import LayerCache, copy_in_place
from .config import MegalodonConfig
from .feed_forward import FeedForward
from .gated_attention import GatedAttention
from .kernels import on_kernels
from .norm import NormState
from .plan import PrefillPlan
from .rotary import Rotary

if TYPE_CHECKING:
    from .distributed.sequence_state import Relay


class MegalodonBlock(nn.Module):
    """One layer of the model."""

    _gradient_checkpointing_func: Any

    def __init__(self, config: MegalodonConfig, layer: int) -> None:
        super().__init__()
        self.attn = GatedAttention(config)
        self.ffn = FeedForward(config, layer)
        self.kernels = False  # see `use_kernels`
        self.gradient_checkpointing = False  # transformers sets it, together with the function

    def forward(
        self, x: Tensor, plan: PrefillPlan, rotary: Rotary, cache: LayerCache | None, relay: Relay | None = None
    ) -> Tensor:
        """x (B, L, D) -> (B, L, D); the layer's cache is updated in place.

        `relay` passes the state on between processes that have pieces of one sequence.
        """
        if on_kernels(self) and cache is not None:
            from .kernels.prefill.layer import layer_prefill

            return layer_prefill(self.attn, self.ffn, x, plan.lengths, plan.position, rotary, cache)
        if not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return self._prefill(x, plan, rotary, cache, relay)
        if cache is None:
            return self._gradient_checkpointing_func(self._prefill, x, plan, rotary, None, relay)
        # Backward runs the layer again, so it must find the cache as it was, and leave it as it is by then.
        y, *new = self._gradient_checkpointing_func(self._prefill_from, x, plan, rotary, *cache.clone().tensors())
        copy_in_place(cache.tensors(), new)
        return y

    def _prefill(
        self, x: Tensor, plan: PrefillPlan, rotary: Rotary, cache: LayerCache | None, relay: Relay | None = None
    ) -> Tensor:
        h, norm, ema = self.attn(x, plan, rotary, cache, relay)
        if cache is not None:
            _store(cache, norm, ema)
        return self.ffn(h, x)

    def _prefill_from(self, x: Tensor, plan: PrefillPlan, rotary: Rotary, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The same on a copy of the cache, which it returns as well."""
        cache = LayerCache(*tensors).clone()
        return self._prefill(x, plan, rotary, cache), *cache.tensors()

    def step(self, x: Tensor, position: Tensor, rotary: Rotary, cache: LayerCache) -> Tensor:
        """One token, x (B, D) -> (B, D); otherwise as `forward`."""
        if on_kernels(self):
            from .kernels.decode.layer import layer_step

            return layer_step(self.attn, self.ffn, x, position, rotary, cache)
        h, norm, ema = self.attn.step(x, position, rotary, cache)
        _store(cache, norm, ema)
        return self.ffn(h, x)


def _store(cache: LayerCache, norm: NormState, ema: Tensor) -> None:
    """Write a layer's new small states into its cache, in place; not part of the autograd graph."""
    norm.store(cache)
    cache.ema_state.copy_(ema.detach())
