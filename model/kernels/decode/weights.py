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
from ..launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)  # the interpreter has no inline assembly
_EXPONENT = tl.constexpr(0x4B000000)  # the float32 2^23, whose lowest mantissa bits count ones
_TWO_POW_23 = tl.constexpr(2.0**23)
# PTX without line breaks: AOTInductor copies these strings into a string of Python.
# Four int8 of a word as bfloat16, exactly. The low 7 bits of a byte are the mantissa of 128 + low; the sign bit makes
# 128 or 256, which is subtracted.
_FOUR_BYTES = tl.constexpr(
    "{ "
    ".reg .b32 low, sign, a, b, minus_one; "
    "mov.b32 minus_one, 0xBF80BF80; "
    "and.b32 low, $2, 0x7f7f7f7f; "
    "and.b32 sign, $2, 0x80808080; "
    "prmt.b32 a, low, 0x43434343, 0x4140; "
    "prmt.b32 b, sign, 0x43434343, 0x4140; "
    "fma.rn.bf16x2 $0, b, minus_one, a; "
    "prmt.b32 a, low, 0x43434343, 0x4342; "
    "prmt.b32 b, sign, 0x43434343, 0x4342; "
    "fma.rn.bf16x2 $1, b, minus_one, a; "
    "}"
)
# The low and the high 4 bits of a word's bytes as bfloat16, exactly. 4 bits v are the mantissa of 128 + v, from which
# 136 is subtracted: int4 is stored plus 8.
_EIGHT_NIBBLES = tl.constexpr(
    "{ "
    ".reg .b32 low, high, a, one, offset; "
    "mov.b32 one, 0x3F803F80; "
    "mov.b32 offset, 0xC308C308; "
    "and.b32 low, $4, 0x0f0f0f0f; "
    "shr.u32 high, $4, 4; "
    "and.b32 high, high, 0x0f0f0f0f; "
    "prmt.b32 a, low, 0x43434343, 0x4140; "
    "fma.rn.bf16x2 $0, a, one, offset; "
    "prmt.b32 a, low, 0x43434343, 0x4342; "
    "fma.rn.bf16x2 $1, a, one, offset; "
    "prmt.b32 a, high, 0x43434343, 0x4140; "
    "fma.rn.bf16x2 $2, a, one, offset; "
    "prmt.b32 a, high, 0x43434343, 0x4342; "
    "fma.rn.bf16x2 $3, a, one, offset; "
    "}"
)


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
def weight_as(weight, dtype: tl.constexpr):
    """Floats and int8 as `dtype`, exactly for int8."""
    if weight.dtype == tl.int8 and dtype == tl.bfloat16 and not _INTERPRETED:
        converted = tl.inline_asm_elementwise(_FOUR_BYTES, "=r,=r,r", [weight], dtype=tl.bfloat16, is_pure=True, pack=4)
    elif weight.dtype == tl.int8:
        converted = weight_to_float(weight).to(dtype)
    else:
        converted = weight.to(dtype)
    return converted


@triton.jit
def load_output_features(vector_ptr, feature, OUT: tl.constexpr):
    """A vector (OUT) of output features, such as a bias or int8's scales, at some of them, float32."""
    return tl.load(vector_ptr + feature, mask=feature < OUT, other=0.0).to(tl.float32)


@triton.jit
def two_floats(words):
    """int32 (...) -> (..., 2) bfloat16: the low half of each word, then the high one."""
    low = (words & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
    high = (words >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, high)


@triton.jit
def _byte(words, INDEX: tl.constexpr):
    """One of the four bytes of each word, with its sign."""
    return (words << (24 - 8 * INDEX)) >> 24


@triton.jit
def four_bytes(words):
    """Four int8 of each word as bfloat16, (...) -> (..., 4)."""
    if _INTERPRETED:
        even, odd = tl.join(_byte(words, 0), _byte(words, 2)), tl.join(_byte(words, 1), _byte(words, 3))
        four = tl.join(even, odd).to(tl.float32).to(tl.bfloat16)
    else:
        first, second = tl.inline_asm_elementwise(
            _FOUR_BYTES, "=r,=r,r", [words], dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        four = two_floats(tl.join(first, second))
    return four


@triton.jit
def _nibble(words, INDEX: tl.constexpr, SHIFT: tl.constexpr):
    """4 bits of one of the four bytes of each word, less the 8 that was added when they were packed."""
    return ((words >> (8 * INDEX + SHIFT)) & 15) - 8


@triton.jit
def _four_nibbles(words, SHIFT: tl.constexpr):
    even = tl.join(_nibble(words, 0, SHIFT), _nibble(words, 2, SHIFT))
    odd = tl.join(_nibble(words, 1, SHIFT), _nibble(words, 3, SHIFT))
    return tl.join(even, odd).to(tl.float32).to(tl.bfloat16)


@triton.jit
def eight_nibbles(words):
    """The low and the high 4 bits of the four bytes of each word as bfloat16, 2 x (..., 4)."""
    if _INTERPRETED:
        low, high = _four_nibbles(words, 0), _four_nibbles(words, 4)
    else:
        low_first, low_second, high_first, high_second = tl.inline_asm_elementwise(
            _EIGHT_NIBBLES, "=r,=r,=r,=r,r", [words],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        low = two_floats(tl.join(low_first, low_second))
        high = two_floats(tl.join(high_first, high_second))
    return low, high
