"""Weight-only quantisation: linear layers that hold integers and scales, as plain tensors that every program reads.

int8: symmetric, one scale a row, every linear layer. int4: symmetric, one scale a group of a row's features; the head
stays int8. Integers and scales are torchao's. Embedding, EMA, norms and biases keep their dtype. A head that is tied to
the embedding becomes an int8 tensor of its own, so that the embedding stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from .config import QUANTIZED_FORMATS, WeightFormat
from .norm import accumulation_dtype, cast

ZERO = 8  # the 4 bits of the integer 0
_RANGES = {"int8": (-128, 127), "int4": (-8, 7)}


class QuantizedLinear(nn.Module):
    """nn.Linear with weights W (N, K) as integers times scales; y = x W^T + bias.

    `weight` is int8 (N, K); or, for int4, uint8 (N, K/2): byte j of a row has feature j in its low and feature j + K/2
    in its high 4 bits, each plus 8, so that a row's halves are read without interleaving. `scale` is float32
    (N, groups), one for K / groups consecutive features of a row; int8 has one group. `bias` is (N), as in nn.Linear.
    """

    weight: Tensor
    scale: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool, weight_format: WeightFormat, group_size: int
    ) -> None:
        super().__init__()
        packed = weight_format == "int4"
        groups = in_features // group_size if packed else 1
        self.in_features, self.out_features = in_features, out_features
        weight = torch.full((out_features, in_features // 2), ZERO * 17, dtype=torch.uint8) if packed else None
        self.register_buffer(
            "weight", torch.zeros(out_features, in_features, dtype=torch.int8) if weight is None else weight
        )
        self.register_buffer("scale", torch.ones(out_features, groups, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """W (N, K): integers times scales in float32 (float64 for float64), rounded once to `dtype`."""
        wide = accumulation_dtype(dtype)
        integers = self.weight if self.weight.dtype == torch.int8 else unpack(self.weight)
        groups = integers.to(wide).unflatten(-1, (self.scale.shape[-1], -1))
        return cast((groups * cast(self.scale, wide)[..., None]).flatten(-2), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N), in x's dtype."""
        return F.linear(x, self.dequantized(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        bits = 8 if self.weight.dtype == torch.int8 else 4
        return f"{self.in_features}, {self.out_features}, int{bits}, groups={self.scale.shape[-1]}"


def pack(integers: Tensor) -> Tensor:
    """Integers -8..7 (N, K), K even -> uint8 (N, K/2)."""
    low, high = (integers + ZERO).to(torch.uint8).chunk(2, dim=-1)
    return low | high << 4


def unpack(packed: Tensor) -> Tensor:
    """uint8 (N, K/2) -> integers -8..7 (N, K) as int32: compilers vectorise no shift of single bytes."""
    wide = packed.int()
    return torch.cat([wide & 15, wide >> 4], dim=-1) - ZERO


def quantize(model: PreTrainedModel, weight_format: WeightFormat, group_size: int | None = None) -> None:
    """Quantise the linear layers of a MegalodonForCausalLM in place, and say so in its config.

    `group_size` is int4's number of features a scale (default 32). ValueError for a model that is quantised already,
    for formats that do not exist, or for groups that do not divide half a row; ImportError without torchao.
    """
    config = model.config
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
            new = QuantizedLinear(*_sizes(layer), layer_format, config.group_size)
        new.weight, new.scale = (integers if layer_format == "int8" else pack(integers)).contiguous(), scale
        new.bias = layer.bias
        return new.train(layer.training)

    replace_linear_layers(model, weight_format, quantized)
    model.config = model.base_model.config = config  # type: ignore[assignment]
    # the head is tied no longer; from __init__ on this lists what saving leaves out
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)


def empty_quantized(config_group_size: int) -> Callable[[nn.Linear, WeightFormat], QuantizedLinear]:
    """For `replace_linear_layers`: a layer of the same sizes, to be filled from a checkpoint."""
    return lambda layer, layer_format: QuantizedLinear(*_sizes(layer), layer_format, config_group_size)


def replace_linear_layers(
    model: nn.Module, weight_format: WeightFormat, make: Callable[[nn.Linear, WeightFormat], QuantizedLinear]
) -> None:
    """Put `make(layer, format)` in the place of every nn.Linear; the head is int8 in every format."""
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(module, name, make(layer, "int8" if name == "lm_head" else weight_format))


def _sizes(layer: nn.Linear) -> tuple[int, int, bool]:
    return layer.in_features, layer.out_features, layer.bias is not None


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
