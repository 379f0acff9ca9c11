"""Weights of linear layers as the decode kernels read them: floats, or integers with scales (`model/quantized.py`).

    BITS   stored as                                             scales
    0      (N, K) float32 or bfloat16                            none
    8      (N, K) int8                                           (N, 1) float32
    4      (N, K / 2) uint8: features j and j + K / 2 a byte     (N, K / GROUP) float32

With int4, one byte meets both halves of the vector x, so nothing has to be interleaved.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from ...quantized import unpack

_EXPONENT = tl.constexpr(0x4B000000)  # the float32 2^23, whose lowest mantissa bits count ones
_TWO_POW_23 = tl.constexpr(2.0**23)


def linear_tensors(layer: nn.Module | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Weight, scale and bias of a linear layer, quantised or not; None for each that it does not have."""
    weight, scale, bias = (getattr(layer, name, None) for name in ("weight", "scale", "bias"))
    return weight, scale, bias


def weight_reference(weight: Tensor, scale: Tensor | None) -> Tensor:
    """W (N, K) float32 of a stored weight and its scales."""
    if scale is None:
        return weight.float()
    integers = weight if weight.dtype == torch.int8 else unpack(weight)
    return (integers.float().unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2)


def storage_format(weight: Tensor, scale: Tensor | None, columns: int) -> dict[str, Any]:
    """BITS and GROUP of a weight with K = `columns` input features; GROUP is 0 but for int4."""
    if scale is None:
        return {"BITS": 0, "GROUP": 0}
    return {"BITS": 8, "GROUP": 0} if weight.dtype == torch.int8 else {"BITS": 4, "GROUP": columns // scale.shape[1]}


def stored_columns(columns: int, sizes: dict[str, Any]) -> int:
    """Columns of the stored weight: K, or for int4 K / 2 bytes."""
    return columns // 2 if sizes["BITS"] == 4 else columns


@triton.jit
def integer_to_float(integer):
    """A small integer >= 0 as float32, by two cheap instructions: a conversion has a quarter of their rate."""
    return (integer | _EXPONENT).to(tl.float32, bitcast=True) - _TWO_POW_23


@triton.jit
def weight_to_float(weight):
    """Floats and int8 as float32."""
    if weight.dtype == tl.int8:
        return integer_to_float((weight.to(tl.int32) & 255) ^ 128) - 128.0
    else:
        return weight.to(tl.float32)


@triton.jit
def load_output_features(vector_ptr, feature, OUT: tl.constexpr):
    """A vector (OUT) of output features, such as a bias or int8's scales, at some of them, float32."""
    return tl.load(vector_ptr + feature, mask=feature < OUT, other=0.0).to(tl.float32)
