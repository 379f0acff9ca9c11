"""accelerate's hooks on the modules of a model that it has spread over devices or offloaded (`device_map`)."""

from __future__ import annotations

import torch
from torch import nn


def is_dispatched(layer: nn.Module) -> bool:
    """Whether accelerate moves a layer's weights or inputs to their device, which it does in `forward` alone."""
    return any(hasattr(module, "_hf_hook") for module in (layer, layer.attn))


def execution_device(module: nn.Module, default: torch.device) -> torch.device:
    """The device a module runs on; offloaded weights are elsewhere until then."""
    hooks = [getattr(m, "_hf_hook", None) for m in (module, getattr(module, "attn", module))]
    devices = [getattr(hook, "execution_device", None) for hook in hooks]
    return next((torch.device(device) for device in devices if device is not None), default)
