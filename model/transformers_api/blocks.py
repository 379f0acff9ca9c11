"""The block as transformers trains it: with gradient checkpointing, also over a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..blocks import MegalodonBlock
from ..cache import LayerCache, copy_in_place
from ..plan import PrefillPlan
from ..rotary import Rotary


class MegalodonDecoderLayer(MegalodonBlock):
    """`MegalodonBlock`, whose activations the backward pass computes again if gradient checkpointing is enabled."""

    _gradient_checkpointing_func: Any
    gradient_checkpointing = False  # transformers sets it, together with the function

    def forward(self, x: Tensor, plan: PrefillPlan, rotary: Rotary, cache: LayerCache | None) -> Tensor:
        """As `MegalodonBlock.forward`."""
        if not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return super().forward(x, plan, rotary, cache)
        if cache is None:
            y: Tensor = self._gradient_checkpointing_func(super().forward, x, plan, rotary, None)
            return y
        # The backward pass runs the layer again, so it must find the cache as it was, and leave it as it is by then.
        y, *new = self._gradient_checkpointing_func(self._forward_on_copy, x, plan, rotary, *cache.clone().tensors())
        copy_in_place(cache.tensors(), new)
        return y

    def _forward_on_copy(self, x: Tensor, plan: PrefillPlan, rotary: Rotary, *tensors: Tensor) -> tuple[Tensor, ...]:
        """`MegalodonBlock.forward` on a copy of the cache's tensors, which it returns as well."""
        cache = LayerCache(*tensors).clone()
        return super().forward(x, plan, rotary, cache), *cache.tensors()
