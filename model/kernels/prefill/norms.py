"""TimestepNorm of a prefill from running statistics, and the RMSNorm behind the EMA.

    megalodon_group_moments   mean and variance inside each group at every token, and their sums over a segment
    megalodon_timestep_norm   running statistics at every token from the sums before it, and the normalised tokens
    megalodon_rms_norm        RMSNorm, launched by `ema.py`

Sums over time run in float64, since variances come from differences of large sums.
`model/norm.py: TimestepNorm.forward` is the plain form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from ...plan import SEGMENT
from ..elementwise import rsqrt
from ..launch import grid_dependency_wait, launch, launch_dependents, supports_pdl
from ..timestep_norm import group_tile_sizes, timestep_norm_token_reference
from . import WIDE_DIM

if TYPE_CHECKING:
    from ...norm import TimestepNorm


def timestep_norm_reference(
    x: Tensor,
    lengths: Tensor,
    position: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    hf_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Token by token: x_norm (B, L, D), zeros where not valid, and the new statistics (B, G)."""
    y, mean, var = torch.zeros_like(x), mean.clone(), var.clone()
    for t in range(x.shape[1]):
        rows = (t < lengths).nonzero()[:, 0]  # those for which token t is valid
        new_mean, new_var = mean[rows], var[rows]
        states = position[rows] + t, new_mean, new_var
        y[rows, t] = timestep_norm_token_reference(x[rows, t], *states, weight, bias, eps, hf_statistics).to(x.dtype)
        mean[rows], var[rows] = new_mean, new_var
    return y, mean, var


@triton_op("megalodon::timestep_norm", mutates_args={})
def timestep_norm(
    x: Tensor,
    lengths: Tensor,
    position: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    hf_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """TimestepNorm of new tokens: x_norm (B, L, D), zeros where not valid, and the new statistics (B, G).

    x (B, L, D); lengths, position (B) int64; mean, var (B, G) float32; weight, bias (D).
    """
    batch, length, dim = x.shape
    groups = mean.shape[1]
    group = group_tile_sizes(dim, groups, 64 if dim < WIDE_DIM else 128)
    segments = (length + SEGMENT - 1) // SEGMENT
    mu = x.new_empty(batch, length, groups, dtype=torch.float32)
    within = torch.empty_like(mu)
    sums = x.new_empty(batch, segments, 2, groups, dtype=torch.float64)
    y, new_mean, new_var = torch.empty_like(x), mean.clone(), var.clone()
    grid = (segments, -(-groups // group["GROUPS"]), batch)
    sizes: dict[str, Any] = {**group, "HF": hf_statistics, "S": SEGMENT, "PDL": supports_pdl(x), "num_warps": 4}
    launch(megalodon_group_moments, grid)(x, lengths, mu, within, sums, length, **sizes)
    launch(megalodon_timestep_norm, grid)(
        *(x, lengths, position, mean, var, new_mean, new_var, mu, within, sums, weight, bias, y, length, eps), **sizes
    )
    return y, new_mean, new_var


def timestep_norm_(
    norm: TimestepNorm, x: Tensor, lengths: Tensor, position: Tensor, mean: Tensor, var: Tensor
) -> Tensor:
    """`timestep_norm` with a module's parameters; mean and var (B, G) change in place."""
    y, new_mean, new_var = timestep_norm(
        *(x, lengths, position, mean, var, norm.weight, norm.bias, norm.eps, norm.statistics == "megalodon-hf")
    )
    mean.copy_(new_mean)
    var.copy_(new_var)
    return y


@triton.jit
def group_tile(
    g, L, token, G: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, GROUP_P: tl.constexpr, S: tl.constexpr
):
    """Offsets (S, GROUPS, GROUP_P) of a tile of tokens and groups in (L, D), and which of them exist."""
    inside = tl.arange(0, GROUP_P)
    at = token[:, None, None] * (G * GROUP) + (g[:, None] * GROUP + inside[None, :])[None, :, :]
    ok = (token < L)[:, None, None] & ((g < G)[:, None] & (inside < GROUP)[None, :])[None, :, :]
    return at, ok


@triton.jit
def megalodon_group_moments(
    x_ptr, lengths_ptr, mu_ptr, var_ptr, sums_ptr,
    L,
    G: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, GROUPS: tl.constexpr, HF: tl.constexpr,
    S: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Mean mu and variance var inside each group at every token, and sums over S tokens of mu and var + mu^2.

    In: x (B, L, D = G GROUP); lengths (B). Out: mu, var (B, L, G) float32; sums (B, segments, 2, G) float64, of a
    row's valid tokens (with HF of mu and mu^2). Grid: (segments, ceil(G / GROUPS), B). The tile (S, GROUPS, GROUP_P)
    of x stays in registers.
    """
    launch_dependents(PDL)
    segment = tl.program_id(0)
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    b = tl.program_id(2).to(tl.int64)
    token = segment * S + tl.arange(0, S)
    at, ok = group_tile(g, L, token, G, GROUP, GROUPS, GROUP_P, S)
    grid_dependency_wait(PDL)
    x = tl.load(x_ptr + b * L * (G * GROUP) + at, mask=ok, other=0.0).to(tl.float32)
    mu = tl.sum(x, 2) / GROUP
    centred = tl.where(ok, x - mu[:, :, None], 0.0)
    var = tl.sum(centred * centred, 2) / GROUP
    place = b * L * G + token[:, None] * G + g[None, :]
    place_ok = (token < L)[:, None] & (g < G)[None, :]
    tl.store(mu_ptr + place, mu, mask=place_ok)
    tl.store(var_ptr + place, var, mask=place_ok)
    valid = (token < tl.load(lengths_ptr + b))[:, None]
    first = tl.where(valid, mu.to(tl.float64), 0.0)
    second = first * mu.to(tl.float64)
    if not HF:
        second += tl.where(valid, var.to(tl.float64), 0.0)
    entry = sums_ptr + (b * tl.num_programs(0) + segment) * (2 * G) + g
    tl.store(entry, tl.sum(first, 0), mask=g < G)
    tl.store(entry + G, tl.sum(second, 0), mask=g < G)


@triton.jit
def sums_before(sums_ptr, b, segment, segments, g, g_ok, G: tl.constexpr, GROUPS: tl.constexpr, S: tl.constexpr):
    """Both sums (GROUPS) float64 over the segments before this one, S segments at a time."""
    steps = tl.arange(0, S)
    first = tl.zeros((GROUPS,), tl.float64)
    second = tl.zeros((GROUPS,), tl.float64)
    for earlier in range(0, segment, S):
        other = earlier + steps
        entry = sums_ptr + (b * segments + other)[:, None] * (2 * G) + g[None, :]
        entry_ok = (other < segment)[:, None] & g_ok[None, :]
        first += tl.sum(tl.load(entry, mask=entry_ok, other=0.0), 0)
        second += tl.sum(tl.load(entry + G, mask=entry_ok, other=0.0), 0)
    return first, second


@triton.jit
def running_statistics(
    first, second, mean_ptr, var_ptr, b, g, g_ok, position, token, length, G: tl.constexpr, HF: tl.constexpr
):
    """Mean and variance (S, GROUPS) float32 of all that each group has seen up to each token.

    first, second (S, GROUPS) float64 are the sums over this call's tokens; mean and var (B, G) are those before it.
    """
    count = position.to(tl.float64)
    seen = (position + tl.minimum(token + 1, length)).to(tl.float64)[:, None]
    seen = tl.maximum(seen, 1.0)
    mean_in = tl.load(mean_ptr + b * G + g, mask=g_ok, other=0.0).to(tl.float64)[None, :]
    var_in = tl.load(var_ptr + b * G + g, mask=g_ok, other=1.0).to(tl.float64)[None, :]
    mean = (count * mean_in + first) / seen
    prior = tl.maximum(count, 1.0) if HF else count
    variance = (prior * var_in + count * mean_in * mean_in + second) / seen - mean * mean
    variance = tl.maximum(variance, 1e-6 if HF else 0.0).to(tl.float32)
    return mean.to(tl.float32), variance


@triton.jit
def megalodon_timestep_norm(
    x_ptr, lengths_ptr, position_ptr, mean_ptr, var_in_ptr, new_mean_ptr, new_var_ptr,
    mu_ptr, var_ptr, sums_ptr, weight_ptr, bias_ptr, y_ptr,
    L, eps,
    G: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, GROUPS: tl.constexpr, HF: tl.constexpr,
    S: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y = TimestepNorm(x), zeros where not valid, and the statistics after each row's last valid token.

    In: x (B, L, D = G GROUP); lengths, position (B); mean, var_in (B, G) float32; mu, var, sums of
    `megalodon_group_moments`; weight, bias (D). Out: y (B, L, D); new_mean, new_var (B, G), left alone in a row
    without valid tokens. Grid: (segments, ceil(G / GROUPS), B). The segment's statistics (S, GROUPS) stay in registers.
    """
    launch_dependents(PDL)
    segment = tl.program_id(0)
    segments = tl.num_programs(0)
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    g_ok = g < G
    b = tl.program_id(2).to(tl.int64)
    token = segment * S + tl.arange(0, S)
    grid_dependency_wait(PDL)
    length = tl.load(lengths_ptr + b)
    position = tl.load(position_ptr + b)
    first_before, second_before = sums_before(sums_ptr, b, segment, segments, g, g_ok, G, GROUPS, S)
    place = b * L * G + token[:, None] * G + g[None, :]
    valid = token < length
    place_ok = valid[:, None] & g_ok[None, :]
    mu = tl.load(mu_ptr + place, mask=place_ok, other=0.0).to(tl.float64)
    moment = mu * mu
    if not HF:
        moment += tl.load(var_ptr + place, mask=place_ok, other=0.0).to(tl.float64)
    first = tl.cumsum(mu, 0) + first_before[None, :]
    second = tl.cumsum(moment, 0) + second_before[None, :]
    mean, variance = running_statistics(first, second, mean_ptr, var_in_ptr, b, g, g_ok, position, token, length, G, HF)
    last = (token == length - 1)[:, None] & g_ok[None, :]
    out = b * G + g[None, :] + tl.zeros((S, 1), tl.int32)
    tl.store(new_mean_ptr + out, mean, mask=last)
    tl.store(new_var_ptr + out, variance, mask=last)

    at, ok = group_tile(g, L, token, G, GROUP, GROUPS, GROUP_P, S)
    inside = tl.arange(0, GROUP_P)
    channel = g[:, None] * GROUP + inside[None, :]
    channel_ok = g_ok[:, None] & (inside < GROUP)[None, :]
    weight = tl.load(weight_ptr + channel, mask=channel_ok, other=0.0).to(tl.float32) + 1.0
    bias = tl.load(bias_ptr + channel, mask=channel_ok, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + b * L * (G * GROUP) + at, mask=ok, other=0.0).to(tl.float32)
    y = (x - mean[:, :, None]) * rsqrt(variance, eps)[:, :, None] * weight[None, :, :] + bias[None, :, :]
    y = tl.where(valid[:, None, None], y, 0.0)
    tl.store(y_ptr + b * L * (G * GROUP) + at, y.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def megalodon_rms_norm(
    y_ptr, lengths_ptr, weight_ptr, m_ptr,
    L, eps,
    D: tl.constexpr, D_P: tl.constexpr, AFFINE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """m = RMSNorm(y) * (weight + 1), without the weight unless AFFINE; zeros where not valid.

    In: y (B, L, D) float32; lengths (B); weight (D). Out: m (B, L, D). Grid: (L, B), one token a program, whose
    features stay in registers.
    """
    launch_dependents(PDL)
    token = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, D_P)
    ok = k < D
    scale = tl.full((D_P,), 1.0, tl.float32)
    if AFFINE:
        scale += tl.load(weight_ptr + k, mask=ok, other=0.0).to(tl.float32)
    grid_dependency_wait(PDL)
    valid = token < tl.load(lengths_ptr + b)
    at = (b * L + token) * D + k
    y = tl.load(y_ptr + at, mask=ok & valid, other=0.0)
    m = y * rsqrt(tl.sum(y * y, 0) / D, eps) * scale
    tl.store(m_ptr + at, m.to(m_ptr.dtype.element_ty), mask=ok)
