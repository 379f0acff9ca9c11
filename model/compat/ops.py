"""The seven operations of the original (megalodon/modules/fused_ops, csrc/ops) as differentiable functions.

They have its arguments, its layouts and its complex tensors, run on any device in float32 and float64 (half precisions
are computed in float32), and are made of the same functions as the model's layers.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..attention import masked_softmax
from ..config import BLOCK
from ..ema import (
    block_powers,
    causal_convolution,
    convolution_kernel,
    from_incoming,
    powers_of_q,
    real_part_weights,
    scan_blocks,
)
from ..ema import complex_mul as multiply
from ..norm import NormState, accumulation_dtype, cast, normalized, running_statistics
from ..plan import PrefillPlan


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float = 1.0,
    dropout: float = 0.0,
    use_causal_mask: bool = True,
    training: bool = True,
) -> Tensor:
    """softmax(scale q k^T) v: q (B, L, H, dz), k (B, S, H, dz), v (B, S, H, dv) -> (B, L, H, dv).

    The mask and DropKey are those of `attention_softmax`.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    weights = attention_softmax(scale * (q @ k.mT), dropout, use_causal_mask, training)
    return (weights @ v).transpose(1, 2)


def attention_softmax(x: Tensor, dropout: float = 0.0, use_causal_mask: bool = True, training: bool = True) -> Tensor:
    """softmax over the keys of scores x (..., L, S), where the last query sees every key and each before it one less.

    In training each key of each query is dropped with probability `dropout` before the softmax (DropKey, Li et al.
    2023), so the remaining weights sum to 1 and are not rescaled. A query without any key gets zeros.
    """
    queries, keys = x.shape[-2:]
    allowed = torch.ones(queries, keys, dtype=torch.bool, device=x.device)
    if use_causal_mask:
        allowed = allowed.tril(keys - queries)
    weights = masked_softmax(x, allowed, x.dtype, dropout if training else 0.0, drop_key=True)
    return weights * allowed.any(-1, keepdim=True)


def ema_parameters(p: Tensor, q: Tensor, gamma: Tensor, hx: Tensor | None, length: int) -> tuple[Tensor, Tensor | None]:
    """The EMA as a convolution: kernel (D, L) = Re(sum_n gamma p q^t), bias (B, D, L) = Re(sum_n gamma q^(t+1) hx).

    p (D, N, 1) real, q (D, N, 1) complex and not 0, gamma (D, N) complex, hx (B, D, N) complex or None (no bias).
    """
    c = _coefficients(p, q) | {"gamma": torch.view_as_real(gamma)}
    exponents = torch.arange(BLOCK + 1, device=p.device)[:, None]
    powers = powers_of_q(c["log_magnitude"][:, None], c["phase_cycles"][:, None], exponents)
    starts = block_powers(c, length, p.device)
    weight = convolution_kernel(c, powers, starts, length)
    if hx is None:
        return weight, None
    from_state = real_part_weights(multiply(powers[:, 1:], c["gamma"][:, None]))
    return weight, from_incoming(torch.view_as_real(hx), from_state, starts, length).mT


def ema_hidden(x: Tensor, p: Tensor, q: Tensor, hx: Tensor | None) -> Tensor:
    """The EMA's last state (B, D, N) complex, q^L hx + sum_t q^(L-1-t) p x_t, of x (B, D, L); others as above."""
    c = _coefficients(p, q)
    x = cast(x, c["p"].dtype).mT
    state = x.new_zeros(x.shape[0], *c["p"].shape, 2) if hx is None else torch.view_as_real(hx)
    plan = _plan_of(x, None, x.new_zeros(x.shape[0], dtype=torch.int64))
    return torch.view_as_complex(scan_blocks(c, x, plan, state).last_state(plan).contiguous())


def fftconv(x: Tensor, k: Tensor) -> Tensor:
    """Causal convolution y_t = sum_{s <= t} k_s x_{t-s} by FFT: x (B, D, L), k (D, L) -> (B, D, L) in x's dtype."""
    dtype = accumulation_dtype(x.dtype)
    return cast(causal_convolution(cast(x, dtype).mT, cast(k, dtype)).mT, x.dtype)


def sequence_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    padding_mask: Tensor | None = None,
    num_groups: int | None = None,
    eps: float = 1e-5,
    length_last: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise each feature, or each of `num_groups` groups of features, over the whole sequence.

    x (B, L, D), or (B, D, L) with `length_last`; gamma, beta (D); padding_mask (B, L) is True where padded. Returns y
    (0 where padded), and of each row the valid steps (B), the mean and 1 / sqrt(variance + eps) (B, groups).
    """
    x = x.mT if length_last else x
    grouped = cast(x.unflatten(-1, (num_groups or x.shape[-1], -1)), accumulation_dtype(x.dtype))  # (B, L, G, D/G)
    valid = _valid(x, padding_mask)[..., None]
    count = valid.sum((1, 2, 3))
    size = (count * grouped.shape[-1]).clamp(min=1)[:, None]
    mean = torch.where(valid, grouped, 0.0).sum((1, 3)) / size
    variance = torch.where(valid, grouped - mean[:, None, :, None], 0.0).square().sum((1, 3)) / size
    y = normalized(grouped, mean[:, None], variance[:, None], eps) * gamma + beta
    y = cast(torch.where(valid[..., 0], y, 0.0), x.dtype)
    return y.mT if length_last else y, count, mean, torch.rsqrt(variance + eps)


def timestep_norm(
    x: Tensor,
    prev_count: Tensor,
    prev_mean: Tensor,
    prev_var: Tensor,
    gamma: Tensor,
    beta: Tensor,
    padding_mask: Tensor | None = None,
    num_groups: int | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise each step by what each group (default: each feature) has seen up to it: y, new count, mean, variance.

    x (B, L, D); prev_count (B) int64, prev_mean and prev_var (B, groups) are the statistics before it, or a prior
    that counts for so many steps; gamma, beta (D); padding_mask (B, L) is True where a step is padding, anywhere in a
    row: it changes no statistics and its y is 0. Source: arXiv 2404.08801, section 3.2.
    """
    grouped = cast(x.unflatten(-1, (num_groups or x.shape[-1], -1)), accumulation_dtype(x.dtype))
    plan = _plan_of(x, padding_mask, prev_count)
    mean, variance, state = running_statistics(grouped, plan, NormState(prev_mean, prev_var), "megalodon")
    y = normalized(grouped, mean, variance, eps) * gamma + beta
    count = prev_count + plan.tokens.valid.sum((1, 2))
    return cast(torch.where(plan.tokens.valid, y, 0.0), x.dtype), count, state.mean, state.var


def _coefficients(p: Tensor, q: Tensor) -> dict[str, Tensor]:
    """As `ComplexEMA.derive`, from p and q themselves: the phase stays in float64, see `powers_of_q`."""
    p, pairs = p.squeeze(-1), torch.view_as_real(q.squeeze(-1)).double()
    log_magnitude = pairs.square().sum(-1).log() / 2
    phase_cycles = torch.atan2(pairs[..., 1], pairs[..., 0]) / (2 * math.pi)
    return {"p": p, "log_magnitude": cast(log_magnitude, p.dtype), "phase_cycles": phase_cycles}


def _valid(x: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Which steps of x (B, L, D) are no padding, (B, L, 1)."""
    return (~padding_mask if padding_mask is not None else torch.ones_like(x[..., 0], dtype=torch.bool))[..., None]


def _plan_of(x: Tensor, padding_mask: Tensor | None, position: Tensor) -> PrefillPlan:
    """The plan of x (B, L, D) from `position` (B), with padding anywhere."""
    length, valid = x.shape[1], _valid(x, padding_mask)
    plan = PrefillPlan.of(torch.full_like(position, length), position, length, length, length, cached=False)
    seen = (position[:, None, None] + valid.cumsum(1)).clamp(min=1).double()
    return replace(plan, tokens=replace(plan.tokens, valid=valid, seen=seen, has_tokens=valid.any(1)))
