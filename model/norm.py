"""The normalisations; every scale is weight + 1, as in the original.

    TimestepNorm   y_t = (x_t - mean_t) / sqrt(var_t + eps)      mean_t, var_t of all x of the group up to step t
    RMSNorm        y   = x / sqrt(mean(x^2) + eps)
    LayerNorm      y   = (x - mean(x)) / sqrt(var(x) + eps)

TimestepNorm: arXiv 2404.08801, section 3.2. With n steps seen and the within-group mean mu and variance v of step t,
Welford's update is

    mean' = mean + (mu - mean) / (n + 1)        var' = (n var + v + (mu - mean)^2 n / (n + 1)) / (n + 1)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocking import compact, from_blocks, to_blocks
from .config import BLOCK, NormStatistics
from .plan import PrefillPlan, upper_triangle

_HF_VARIANCE_FLOOR = 1e-6


class NormState(NamedTuple):
    """Running statistics of a TimestepNorm, (B, G) float32. The count is the stream's position."""

    mean: Tensor
    var: Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and EMA for a model dtype: float32, or float64 for a float64 model."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a dtype. A tensor of that dtype is returned as it is: exported graphs keep conversions that do nothing."""
    return x if x.dtype == dtype else x.to(dtype)


def prefix_sum(x: Tensor, max_length: int, upper_ones: Tensor | None = None) -> Tensor:
    """Inclusive sums over dim 1 of x (B, L, K), L <= max_length, as triangular products of blocks of 32.

    torch.cumsum will not do: on a GPU, Inductor cannot compile a scan over a middle dimension (SplitScan), and ONNX
    Runtime's takes O(L^2). `upper_ones` is the result of `upper_triangle`, if the caller has it.
    """
    if upper_ones is None:
        upper_ones = upper_triangle(x.device).to(x.dtype)
    if max_length <= BLOCK:
        return _triangular_sums(x, upper_ones, x.shape[1])
    blocks = to_blocks(x, 1, BLOCK)  # (B, blocks, 32, K)
    inside = _triangular_sums(blocks, upper_ones, BLOCK)
    totals, count = inside[:, :, -1], -(-max_length // BLOCK)
    up_to = (
        _triangular_sums(totals, upper_ones, totals.shape[1]) if count <= len(upper_ones) else prefix_sum(totals, count)
    )
    return from_blocks(inside + (up_to - totals)[:, :, None], 1, x.shape[1])


def _triangular_sums(x: Tensor, triangle: Tensor, size: int) -> Tensor:
    """Inclusive sums over the last but one dimension of x (..., T, K), as x^T times an upper triangle of ones."""
    rows = compact(x.mT)  # (..., K, T)
    triangle = triangle.narrow(0, 0, size).narrow(1, 0, size)
    return torch.mm(rows.flatten(0, -2), triangle).unflatten(0, rows.shape[:-1]).mT


class TimestepNorm(nn.Module):
    """Normalises each of G groups of features by the mean and variance of all that the group has seen so far.

    `statistics` "megalodon" takes the variance within groups and between steps, without a prior. "megalodon-hf" takes
    the variance of the group means alone, at least 1e-6. Its sum of squared deviations (Welford's M2; the variance is
    M2 / n) starts at 1, not at 0, so the variance has a bias of 1 / n.
    """

    def __init__(self, dim: int, groups: int, eps: float, statistics: NormStatistics) -> None:
        super().__init__()
        self.groups, self.eps, self.statistics = groups, eps, statistics
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def initial_state(self, batch: int, device: torch.device) -> NormState:
        """Statistics of a stream that has seen nothing."""
        shape = (batch, self.groups)
        dtype = accumulation_dtype(self.weight.dtype)
        return NormState(torch.zeros(shape, dtype=dtype, device=device), torch.ones(shape, dtype=dtype, device=device))

    def forward(self, x: Tensor, plan: PrefillPlan, state: NormState) -> tuple[Tensor, NormState]:
        """Normalise new tokens x (B, L, D), from the statistics before them.

        Returns (B, L, D), exactly 0 where not valid, and the statistics after each row's last valid token.
        """
        grouped = cast(x.unflatten(-1, (self.groups, -1)), accumulation_dtype(x.dtype))  # (B, L, G, D/G)
        mean, variance, state = running_statistics(grouped, plan, state, self.statistics)
        y = self._affine(grouped, mean, variance, x.dtype)
        return torch.where(plan.tokens.valid, y, 0.0), state

    def step(self, x: Tensor, position: Tensor, state: NormState) -> tuple[Tensor, NormState]:
        """Normalise one token of each row, x (B, D), by Welford's update; returns (B, D) and the new statistics."""
        grouped = cast(x.unflatten(-1, (self.groups, -1)), accumulation_dtype(x.dtype))  # (B, G, D/G)
        var, mu = torch.var_mean(grouped, dim=-1, correction=0)
        count = position.to(grouped.dtype)[:, None]
        share = 1 / (count + 1)
        delta = mu - state.mean
        mean = state.mean + delta * share
        between = delta * delta * count * share
        if self.statistics == "megalodon-hf":
            variance = ((count.clamp(min=1) * state.var + between) * share).clamp(min=_HF_VARIANCE_FLOOR)
        else:
            variance = (count * state.var + var + between) * share
        return self._affine(grouped, mean, variance, x.dtype), NormState(mean, variance)

    def _affine(self, grouped: Tensor, mean: Tensor, variance: Tensor, dtype: torch.dtype) -> Tensor:
        y = normalized(grouped, mean, variance, self.eps)
        return cast(y * (cast(self.weight, y.dtype) + 1) + cast(self.bias, y.dtype), dtype)


def normalized(grouped: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    """Groups of features (..., G, D/G) by their means and variances (..., G): (..., D)."""
    return ((grouped - mean[..., None]) * torch.rsqrt(variance[..., None] + eps)).flatten(-2)


def running_statistics(
    grouped: Tensor, plan: PrefillPlan, state: NormState, statistics: NormStatistics
) -> tuple[Tensor, Tensor, NormState]:
    """Mean and variance (B, L, G) of all that each group has seen at each column, and the state after the last token.

    `grouped` (B, L, G, D/G) are the new tokens, `state` the statistics before them. Sums run in float64.
    """
    hf = statistics == "megalodon-hf"
    var, mu = (cast(t, torch.float64) for t in torch.var_mean(grouped, dim=-1, correction=0))  # (B, L, G)
    moments = torch.cat([mu, mu * mu if hf else var + mu * mu], dim=-1)
    first, second = prefix_sum(moments * plan.tokens.valid, plan.max_length, plan.tokens.upper_ones).chunk(2, dim=-1)

    count, seen = plan.tokens.seen_before, plan.tokens.seen
    mean_in, var_in = (cast(s, torch.float64)[:, None] for s in state)
    mean = (count * mean_in + first) / seen
    prior = count.clamp(min=1) if hf else count
    variance = (prior * var_in + count * mean_in * mean_in + second) / seen - mean * mean
    variance = variance.clamp(min=_HF_VARIANCE_FLOOR if hf else 0.0)

    mean, variance = cast(mean, grouped.dtype), cast(variance, grouped.dtype)
    has_tokens = plan.tokens.has_tokens  # a row without tokens keeps its statistics
    last = torch.where(has_tokens, mean[:, -1], state.mean), torch.where(has_tokens, variance[:, -1], state.var)
    return mean, variance, NormState(*last)


class RMSNorm(nn.Module):
    """x over its root mean square, times weight + 1 (no scale if `dim` is None), computed in float32 or better."""

    def __init__(self, dim: int | None, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim)) if dim is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; the result has the accumulation dtype, the caller casts."""
        x = cast(x, accumulation_dtype(x.dtype))
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return y if self.weight is None else y * (cast(self.weight, y.dtype) + 1)


class LayerNorm(nn.Module):
    """Layer normalisation with scale weight + 1, or without affine."""

    def __init__(self, dim: int, eps: float, affine: bool) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.zeros(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x, in x's dtype."""
        weight = None if self.weight is None else self.weight + 1
        return F.layer_norm(x, (self.dim,), weight, self.bias, self.eps)
