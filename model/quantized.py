"""Weight-only quantisation: linear layers that hold integers and scales, as plain tensors that every program reads.

    y = x W^T + bias        W[n, k] = scale[n, k // (K / groups)] * integer[n, k]

int8 is symmetric with one scale for each output feature, in every linear layer. int4 is symmetric with one scale for
each group of input features; the head stays int8. Embedding, EMA, norms and biases keep their dtype. A head that is
tied to the embedding becomes an int8 tensor of its own, so that the embedding stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig, WeightFormat
from .norm import accumulation_dtype, cast
from .precision import at_least_float32

ZERO = 8  # the 4 bits of the integer 0


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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As nn.Module._apply, which `to`, `half`, `cuda` and their like call. The scales stay in float32 or better."""
        scale = self.scale

        def apply(x: Tensor) -> Tensor:
            return at_least_float32(fn, x) if x is scale else fn(x)

        return super()._apply(apply, recurse)  # type: ignore[no-any-return, no-untyped-call]

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


def use_quantized_layers(module: nn.Module, config: ModelConfig) -> None:
    """Put layers for integers, to be filled from a checkpoint, in the places of nn.Linear if the config says so."""
    if config.weight_format != "float":
        replace_linear_layers(module, config.weight_format, empty_quantized(config.group_size))


def empty_quantized(config_group_size: int) -> Callable[[nn.Linear, WeightFormat], QuantizedLinear]:
    """For `replace_linear_layers`: a layer of the same sizes, to be filled from a checkpoint."""
    return lambda layer, layer_format: QuantizedLinear(*sizes_of(layer), layer_format, config_group_size)


def replace_linear_layers(
    model: nn.Module, weight_format: WeightFormat, make: Callable[[nn.Linear, WeightFormat], QuantizedLinear]
) -> None:
    """Put `make(layer, format)` in the place of every nn.Linear; the head is int8 in every format."""
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(module, name, make(layer, "int8" if name == "lm_head" else weight_format))


def sizes_of(layer: nn.Linear) -> tuple[int, int, bool]:
    """The first arguments of a layer of the same sizes."""
    return layer.in_features, layer.out_features, layer.bias is not None
