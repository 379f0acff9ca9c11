"""The TimestepNorm behind the last layer of a decode step; it also increments the position."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, empty_like
from torch.library import triton_op

from ..launch import grid_dependency_wait, launch, launch_dependents, next_power_of_2, supports_pdl
from ..timestep_norm import timestep_norm_token, timestep_norm_token_reference
from .embedding import row_warps


def final_norm_reference(
    x: Tensor,
    position: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    hf_statistics: bool,
) -> Tensor:
    """TimestepNorm of x (B, D); mean and var (B, G) change in place, position (B) grows by 1."""
    y = timestep_norm_token_reference(x, position, mean, var, weight, bias, eps, hf_statistics)
    position += 1
    return y.to(x.dtype)


@triton_op("megalodon::final_norm", mutates_args={"position", "mean", "var"})
def final_norm(
    x: Tensor,
    position: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    hf_statistics: bool,
) -> Tensor:
    """TimestepNorm of one token a row, x (B, D) -> (B, D).

    mean and var (B, G) float32 change in place, and position (B) int64 grows by 1. weight, bias (D).
    """
    batch, dim = x.shape
    groups = mean.shape[1]
    group = dim // groups
    padded = {"G_P": next_power_of_2(groups), "GROUP_P": next_power_of_2(group)}
    y = empty_like(x)
    launch(megalodon_final_norm, (batch,))(
        *(x, position, mean, var, weight, bias, y, eps),
        G=groups,
        GROUP=group,
        **padded,
        HF=hf_statistics,
        PDL=supports_pdl(x),
        num_warps=row_warps(padded["G_P"] * padded["GROUP_P"]),
    )
    return y


@triton.jit
def megalodon_final_norm(
    x_ptr, position_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, y_ptr,
    eps,
    G: tl.constexpr, G_P: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, HF: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y = TimestepNorm(x) with running statistics; position += 1.

    In: x (B, D = G GROUP); weight, bias (D). In and out: position (B) int64; mean, var (B, G) float32. Out: y (B, D).
    Grid: (B,), one program per row, whose features stay in registers. It is the last reader of `position`, so it may
    increment it.
    """
    launch_dependents(PDL)
    b = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, G_P)
    inside = tl.arange(0, GROUP_P)
    ok = (group < G)[:, None] & (inside < GROUP)[None, :]
    channel = group[:, None] * GROUP + inside[None, :]
    weight = tl.load(weight_ptr + channel, mask=ok, other=0.0).to(tl.float32) + 1.0
    bias = tl.load(bias_ptr + channel, mask=ok, other=0.0).to(tl.float32)
    grid_dependency_wait(PDL)
    y, position = timestep_norm_token(
        x_ptr, position_ptr, mean_ptr, var_ptr, b, group, channel, ok, weight, bias, eps, G, GROUP, HF
    )
    tl.store(y_ptr + b * (G * GROUP) + channel, y.to(y_ptr.dtype.element_ty), mask=ok)
    tl.store(position_ptr + b, position + 1)
