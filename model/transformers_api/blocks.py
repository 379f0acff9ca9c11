"""The block as transformers trains it: with gradient checkpointing, also over a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from ..blocks import MegalodonBlock
from ..cache import LayerCache, copy_in_place
from ..plan import PrefillPlan
from ..rotary import Rotary


class MegalodonDecoderLayer(MegalodonBlock, GradientCheckpointingLayer):
    """`MegalodonBlock`, whose activations the backward pass computes again if gradient checkpointing is enabled.

    transformers' GradientCheckpointingLayer runs `forward` through torch.utils.checkpoint then.
    """

    _gradient_checkpointing_func: Any  # transformers sets it

    def __call__(self, x: Tensor, plan: PrefillPlan, rotary: Rotary, cache: LayerCache | None) -> Any:
        """As `MegalodonBlock.forward`.

        The backward pass runs the layer again, so it must find the cache as it was, and leave it as it is by then.
        Checkpointing therefore works on a copy.
        """
        if cache is None or not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return super().__call__(x, plan, rotary, cache)
        y, *new = super().__call__(x, plan, rotary, None, *cache.clone().tensors())
        copy_in_place(cache.tensors(), new)
        return y

    def forward(  # type: ignore[override]
        self, x: Tensor, plan: PrefillPlan, rotary: Rotary, cache: LayerCache | None, *copied: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        """As `MegalodonBlock.forward`.

        `copied` are the tensors of a cache. They stay as they are, and new ones are returned behind the result.
        """
        if not copied:
            return super().forward(x, plan, rotary, cache)
        cache = LayerCache(*copied).clone()
        return super().forward(x, plan, rotary, cache), *cache.tensors()
