"""Tensors that stay in float32 where the rest of a model is cast to half precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .norm import accumulation_dtype


def at_least_float32(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), what `nn.Module.to` and its siblings do to a tensor, without rounding it to half precision.

    A move to another device, and a cast to float64 or back, are done as asked.
    """
    y = function(x)
    if not y.is_floating_point() or y.dtype == accumulation_dtype(y.dtype):
        return y
    return x.to(y.device, torch.float32)
