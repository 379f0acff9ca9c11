"""LayerNorm of rows, and of the sum of three tensors: prefill and the decode step both launch this kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from .elementwise import rsqrt
from .launch import grid_dependency_wait, launch, launch_dependents, next_power_of_2, supports_pdl


def sum_norm_reference(
    first: Tensor, second: Tensor, third: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """LayerNorm(first + second + third), scale weight + 1: (B, L, D) in the dtype of `first`."""
    total = first.float() + second.float() + third.float()
    scale = None if weight is None else weight.float() + 1
    return F.layer_norm(total, total.shape[-1:], scale, None if bias is None else bias.float(), eps).to(first.dtype)


@triton_op("megalodon::sum_norm", mutates_args={})
def sum_norm(
    first: Tensor, second: Tensor, third: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """LayerNorm(first + second + third), scale weight + 1; sums and statistics in float32.

    first, second, third (B, L, D); weight, bias (D) or None -> (B, L, D) in the dtype of `first`.
    """
    batch, length, dim = first.shape
    y = torch.empty_like(first)
    launch(megalodon_layer_norm, (batch * length,))(
        *(first, second, third, *(first if t is None else t for t in (weight, bias)), y, eps),
        D=dim,
        D_P=next_power_of_2(dim),
        SUM=True,
        AFFINE=weight is not None,
        PDL=supports_pdl(first),
        num_warps=4,
    )
    return y


@triton.jit
def load_scale_and_shift(weight_ptr, bias_ptr, k, K: tl.constexpr, AFFINE: tl.constexpr):
    """A LayerNorm's scale, weight + 1, and shift at features k of K, float32; 1 and 0 without AFFINE."""
    scale = tl.full(k.shape, 1.0, tl.float32)
    shift = tl.zeros(k.shape, tl.float32)
    if AFFINE:
        scale += tl.load(weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        shift += tl.load(bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    return scale, shift


@triton.jit
def layer_norm(x, k, eps, scale, shift, K: tl.constexpr):
    """LayerNorm of one row x (padded K) float32, whose elements beyond K are 0; all operands are in registers."""
    centred = tl.where(k < K, x - tl.sum(x, 0) / K, 0.0)
    return centred * rsqrt(tl.sum(centred * centred, 0) / K, eps) * scale + shift


@triton.jit
def megalodon_layer_norm(
    first_ptr, second_ptr, third_ptr, weight_ptr, bias_ptr, y_ptr,
    eps,
    D: tl.constexpr, D_P: tl.constexpr,
    SUM: tl.constexpr, AFFINE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y = LayerNorm(first), or with SUM of first + second + third; scale weight + 1.

    In: first, second, third (rows, D); weight, bias (D). Out: y (rows, D). Grid: (rows,), one row a program.
    The whole row, its scale and its shift stay in registers.
    """
    launch_dependents(PDL)
    k = tl.arange(0, D_P)
    ok = k < D
    at = tl.program_id(0).to(tl.int64) * D + k
    scale, shift = load_scale_and_shift(weight_ptr, bias_ptr, k, D, AFFINE)
    grid_dependency_wait(PDL)
    x = tl.load(first_ptr + at, mask=ok, other=0.0).to(tl.float32)
    if SUM:
        x += tl.load(second_ptr + at, mask=ok, other=0.0).to(tl.float32)
        x += tl.load(third_ptr + at, mask=ok, other=0.0).to(tl.float32)
    y = layer_norm(x, k, eps, scale, shift, D)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=ok)
