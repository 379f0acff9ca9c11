"""TimestepNorm and one step of the complex EMA (CEMA), and the sums of squares for the RMSNorm behind it.

    x_norm = TimestepNorm(x)      h <- q h + p x_norm      y = Re(sum_n gamma_n h_n) + omega x_norm

The RMSNorm of y needs the mean of y^2 over all D features, but a program has only some of them. It writes y times the
norm's scale, and its own sum of squares; `projections.py` applies the factor. `model/ema.py: ComplexEMA.step` and
`model/norm.py: TimestepNorm.step` are the plain form (arXiv 2404.08801, eq. 4-6).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from ..launch import grid_dependency_wait, launch, launch_dependents, next_power_of_2, supports_pdl
from ..timestep_norm import group_tile_sizes, timestep_norm_token, timestep_norm_token_reference

_CHANNELS = 32  # about so many features of a row in one program


def ema_step_reference(
    x: Tensor,
    position: Tensor,
    norm_mean: Tensor,
    norm_var: Tensor,
    ema_state: Tensor,
    weight: Tensor,
    bias: Tensor,
    p: Tensor,
    q: Tensor,
    gamma: Tensor,
    omega: Tensor,
    scale: Tensor | None,
    eps: float,
    hf_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_norm, y * (scale + 1), and the sums of y^2 as one partial sum (B, 1); the states change in place."""
    x_norm = timestep_norm_token_reference(x, position, norm_mean, norm_var, weight, bias, eps, hf_statistics).to(
        x.dtype
    )
    u, (re, im), (q_re, q_im) = x_norm.float(), ema_state.unbind(-1), q.unbind(-1)
    new = torch.stack([q_re * re - q_im * im + p * u[..., None], q_re * im + q_im * re], -1)
    ema_state.copy_(new)
    y = (gamma[..., 0] * new[..., 0] - gamma[..., 1] * new[..., 1]).sum(-1) + omega * u
    scaled = y if scale is None else y * (scale.float() + 1)
    return x_norm, scaled.to(x.dtype), y.square().sum(1, keepdim=True)


@triton_op("megalodon::ema_step", mutates_args={"norm_mean", "norm_var", "ema_state"})
def ema_step(
    x: Tensor,
    position: Tensor,
    norm_mean: Tensor,
    norm_var: Tensor,
    ema_state: Tensor,
    weight: Tensor,
    bias: Tensor,
    p: Tensor,
    q: Tensor,
    gamma: Tensor,
    omega: Tensor,
    scale: Tensor | None,
    eps: float,
    hf_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """TimestepNorm and complex EMA of one token a row.

    x (B, D); position (B) int64; weight, bias (D) of the TimestepNorm; p (D, N), q and gamma (D, N, 2), omega (D),
    float32; scale (D), the RMSNorm's weight, or None. norm_mean, norm_var (B, G) and ema_state (B, D, N, 2), float32,
    change in place. -> x_norm (B, D), y * (scale + 1) (B, D), and partial sums of y^2 (B, partial sums) float32.
    """
    batch, dim = x.shape
    groups, ndim = norm_mean.shape[1], p.shape[1]
    group = group_tile_sizes(dim, groups, _CHANNELS)
    partials = -(-groups // group["GROUPS"])
    x_norm, scaled = torch.empty_like(x), torch.empty_like(x)
    squares = x.new_empty(batch, partials, dtype=torch.float32)
    one_warp = group["GROUPS"] * group["GROUP_P"] * next_power_of_2(ndim) <= 512  # which needs no barriers
    launch(megalodon_ema_step, (batch, partials))(
        *(x, position, norm_mean, norm_var, ema_state, weight, bias, p, q, gamma, omega),
        *(weight if scale is None else scale, x_norm, scaled, squares, eps),
        **group,
        N=ndim,
        N_P=next_power_of_2(ndim),
        HF=hf_statistics,
        AFFINE=scale is not None,
        PDL=supports_pdl(x),
        num_warps=1 if one_warp else 4,
    )
    return x_norm, scaled, squares


@triton.jit
def megalodon_ema_step(
    x_ptr, position_ptr, mean_ptr, var_ptr, state_ptr, weight_ptr, bias_ptr, p_ptr, q_ptr, gamma_ptr, omega_ptr,
    scale_ptr, x_norm_ptr, scaled_ptr, squares_ptr,
    eps,
    G: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, GROUPS: tl.constexpr,
    N: tl.constexpr, N_P: tl.constexpr, HF: tl.constexpr, AFFINE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """TimestepNorm, one EMA step, the output times the RMSNorm's scale, and its partial sum of squares.

    In: x (B, D = G GROUP); position (B) int64; weight, bias, omega, scale (D); p (D, N); q, gamma (D, N, 2).
    In and out: mean, var (B, G); state (B, D, N, 2), float32. Out: x_norm, scaled (B, D); squares (B, programs).
    Grid: (B, ceil(G / GROUPS)), one row and GROUPS groups a program. The constants of its features and their state
    stay in registers.
    """
    launch_dependents(PDL)
    D: tl.constexpr = G * GROUP
    CHANNELS: tl.constexpr = GROUPS * GROUP_P
    b = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    inside = tl.arange(0, GROUP_P)
    ok = (group < G)[:, None] & (inside < GROUP)[None, :]
    channel = group[:, None] * GROUP + inside[None, :]
    flat = tl.reshape(channel, (CHANNELS,))
    flat_ok = tl.reshape(ok, (CHANNELS,))
    # Constants, and the state, which no kernel of this step writes before this one.
    weight = tl.load(weight_ptr + channel, mask=ok, other=0.0).to(tl.float32) + 1.0
    bias = tl.load(bias_ptr + channel, mask=ok, other=0.0).to(tl.float32)
    mode = tl.arange(0, N_P)
    mode_ok = flat_ok[:, None] & (mode < N)[None, :]
    p = tl.load(p_ptr + flat[:, None] * N + mode[None, :], mask=mode_ok, other=0.0)
    pair = tl.arange(0, 2 * N_P)
    pairs = flat[:, None] * (2 * N) + pair[None, :]
    pairs_ok = flat_ok[:, None] & (pair < 2 * N)[None, :]
    q = tl.load(q_ptr + pairs, mask=pairs_ok, other=0.0)
    gamma = tl.load(gamma_ptr + pairs, mask=pairs_ok, other=0.0)
    omega = tl.load(omega_ptr + flat, mask=flat_ok, other=0.0)
    states = state_ptr + b * (D * 2 * N) + pairs
    state = tl.load(states, mask=pairs_ok, other=0.0)
    q_re, q_im = tl.split(tl.reshape(q, (CHANNELS, N_P, 2)))
    g_re, g_im = tl.split(tl.reshape(gamma, (CHANNELS, N_P, 2)))
    re, im = tl.split(tl.reshape(state, (CHANNELS, N_P, 2)))
    scale = tl.full((CHANNELS,), 1.0, tl.float32)
    if AFFINE:
        scale += tl.load(scale_ptr + flat, mask=flat_ok, other=0.0).to(tl.float32)

    grid_dependency_wait(PDL)
    normed, _ = timestep_norm_token(
        x_ptr, position_ptr, mean_ptr, var_ptr, b, group, channel, ok, weight, bias, eps, G, GROUP, HF
    )
    x_norm = tl.reshape(normed, (CHANNELS,)).to(x_norm_ptr.dtype.element_ty)
    tl.store(x_norm_ptr + b * D + flat, x_norm, mask=flat_ok)
    u = x_norm.to(tl.float32)
    new_re = q_re * re - q_im * im + p * u[:, None]
    new_im = q_re * im + q_im * re
    tl.store(states, tl.reshape(tl.join(new_re, new_im), (CHANNELS, 2 * N_P)), mask=pairs_ok)
    y = tl.sum(g_re * new_re - g_im * new_im, 1) + omega * u
    y = tl.where(flat_ok, y, 0.0)
    tl.store(scaled_ptr + b * D + flat, (y * scale).to(scaled_ptr.dtype.element_ty), mask=flat_ok)
    tl.store(squares_ptr + b * tl.num_programs(1) + tl.program_id(1), tl.sum(y * y, 0))
