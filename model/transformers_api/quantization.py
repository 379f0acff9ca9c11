"""Quantising a model's weights with torchao, in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..config import QUANTIZED_FORMATS, WeightFormat
from ..quantized import QuantizedLinear, pack, replace_linear_layers, sizes_of

if TYPE_CHECKING:
    from .config import MegalodonConfig
    from .modeling import MegalodonForCausalLM

_RANGES = {"int8": (-128, 127), "int4": (-8, 7)}


def quantize(model: MegalodonForCausalLM, weight_format: WeightFormat, group_size: int | None = None) -> None:
    """Quantise the linear layers of a MegalodonForCausalLM in place, and say so in its config.

    `group_size` is int4's number of features a scale (default 32). ValueError for a model that is quantised already,
    for formats that do not exist, or for groups that do not divide half a row; ImportError without torchao.
    """
    config: MegalodonConfig = model.config
    if weight_format not in QUANTIZED_FORMATS:
        raise ValueError(f"weight_format is {weight_format!r}, expected one of {', '.join(QUANTIZED_FORMATS)}")
    if config.weight_format != "float":
        raise ValueError(f"the model's weights are {config.weight_format} already; quantise the original checkpoint")
    changed = {"weight_format": weight_format, "group_size": group_size or config.group_size}
    config = type(config)(**{**config.to_diff_dict(), **changed})  # checks them
    primitives = _torchao()

    def quantized(layer: nn.Linear, layer_format: WeightFormat) -> QuantizedLinear:
        weight = layer.weight.detach()
        integers, scale = primitives(weight, layer_format, config.group_size)
        with torch.device("meta"):
            new = QuantizedLinear(*sizes_of(layer), layer_format, config.group_size)
        new.weight, new.scale = (integers if layer_format == "int8" else pack(integers)).contiguous(), scale
        new.bias = layer.bias
        return new.train(layer.training)

    replace_linear_layers(model, weight_format, quantized)
    model.config = model.base_model.config = config  # type: ignore[assignment]
    # the head is tied no longer; from __init__ on this lists what saving leaves out
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)


def _torchao() -> Callable[[Tensor, WeightFormat, int], tuple[Tensor, Tensor]]:
    """torchao's symmetric quantisation of a weight (N, K): int8 integers (N, K) and float32 scales (N, groups)."""
    try:
        from torchao.quantization import MappingType, choose_qparams_affine, quantize_affine
    except ImportError as error:
        raise ImportError("quantising needs torchao: pip install 'megalodon-export[quantize]'") from error

    def quantized(weight: Tensor, weight_format: WeightFormat, group_size: int) -> tuple[Tensor, Tensor]:
        block = (1, group_size if weight_format == "int4" else weight.shape[1])
        weight, bounds = weight.float(), _RANGES[weight_format]
        smallest = torch.finfo(torch.float32).tiny
        scale, zero = choose_qparams_affine(weight, MappingType.SYMMETRIC, block, torch.int8, *bounds, eps=smallest)
        integers = quantize_affine(weight, block, scale, zero, torch.int8, *bounds)
        return integers, scale.view(weight.shape[0], -1)

    return quantized
