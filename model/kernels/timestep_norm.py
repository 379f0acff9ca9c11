"""TimestepNorm of one token a row: the reference, and the device function that two kernels of a decode step share.

    count          tokens that the row has seen (its position)
    mean, var      (B, G): running statistics of every group of features, updated in place (Welford)
    y              (x - mean) / sqrt(var + eps) * (weight + 1) + bias

`model/norm.py: TimestepNorm.step` is the plain form. Prefill's reference repeats this one token by token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementwise import rsqrt
from .launch import next_power_of_2


def timestep_norm_token_reference(
    x: Tensor,
    position: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    hf_statistics: bool,
) -> Tensor:
    """x (B, D), position (B) int64, mean and var (B, G) float32 -> y (B, D) float32; mean and var change in place."""
    grouped = x.float().unflatten(1, (mean.shape[1], -1))  # (B, G, D / G)
    within, mu = torch.var_mean(grouped, dim=-1, correction=0)  # (B, G)
    count = position.float()[:, None]
    between = (mu - mean).square() * count / (count + 1)
    mean += (mu - mean) / (count + 1)
    if hf_statistics:
        var.copy_(((count.clamp(min=1) * var + between) / (count + 1)).clamp(min=1e-6))
    else:
        var.copy_((count * var + within + between) / (count + 1))
    normed = (grouped - mean[..., None]) * torch.rsqrt(var[..., None] + eps)
    return normed.flatten(1) * (weight.float() + 1) + bias.float()


def group_tile_sizes(dim: int, groups: int, channels: int) -> dict[str, int]:
    """Sizes of a kernel whose programs each take whole groups of features, about `channels` features a program.

    Example: 512 features in 64 groups, 32 channels -> GROUP = GROUP_P = 8 features a group, GROUPS = 4 a program.
    """
    group = dim // groups
    padded = next_power_of_2(group)
    per_program = min(max(channels // padded, 1), next_power_of_2(groups))
    return {"G": groups, "GROUP": group, "GROUP_P": padded, "GROUPS": per_program}


@triton.jit
def timestep_norm_token(
    x_ptr, position_ptr, mean_ptr, var_ptr,
    b, group, channel, ok, weight, bias, eps,
    G: tl.constexpr, GROUP: tl.constexpr, HF: tl.constexpr,
):  # fmt: skip
    """TimestepNorm of some groups of row b: y (groups, GROUP_P) float32, and the row's position.

    In memory: x (B, D); position (B) int64; mean, var (B, G) float32, which change in place. In registers: group
    (groups); channel, ok (whether the channel exists), weight (already + 1) and bias (groups, GROUP_P).
    """
    D: tl.constexpr = G * GROUP
    group_ok = group < G
    x = tl.load(x_ptr + b * D + channel, mask=ok, other=0.0).to(tl.float32)
    mean_in = tl.load(mean_ptr + b * G + group, mask=group_ok, other=0.0)
    var_in = tl.load(var_ptr + b * G + group, mask=group_ok, other=1.0)
    position = tl.load(position_ptr + b)
    count = position.to(tl.float32)
    # Several threads hold copies of one statistic. None may write it before all of them have read it.
    tl.debug_barrier()
    mu = tl.sum(x, 1) / GROUP
    within = tl.where(ok, x - mu[:, None], 0.0)
    share = 1.0 / (count + 1.0)
    delta = mu - mean_in
    mean = mean_in + delta * share
    between = delta * delta * count * share
    if HF:
        variance = tl.maximum((tl.maximum(count, 1.0) * var_in + between) * share, 1e-6)
    else:
        variance = (count * var_in + tl.sum(within * within, 1) / GROUP + between) * share
    tl.store(mean_ptr + b * G + group, mean, mask=group_ok)
    tl.store(var_ptr + b * G + group, variance, mask=group_ok)
    return (x - mean[:, None]) * rsqrt(variance, eps)[:, None] * weight + bias, position
