"""The complex exponential moving average (CEMA): one-step recurrence, and prefill in blocks or by FFT.

    h_t = q * h_{t-1} + p * x_t        y_t = Re(sum_n gamma_n h_t,n) + omega * x_t          (arXiv 2404.08801, eq. 4-6)

Prefill works on blocks of T tokens. With Q[s] = q^s (s = 0..T), per channel:

    inside a block   y = x K,  K[i, j] = Re(sum gamma p q^(j-i)) for i <= j (Toeplitz; omega on the diagonal)
    what it adds     s = p * sum_j Q[T-1-j] x_j
    carried state    H_b = q^T H_{b-1} + s_{b-1}     by doubling: log2(blocks) steps
    from the state   y += Re(sum_n gamma q^(t+1) H_b)

The FFT form replaces the first line by one causal convolution over the whole length; everything else is shared.
No complex tensors: pairs (real, imaginary) in a last dimension of 2. Powers of q come from magnitude and phase.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocking import compact, first, from_blocks, to_blocks
from .config import EMAForm
from .constants import DerivedConstants
from .norm import accumulation_dtype, cast
from .plan import BLOCK, SEGMENT, PrefillPlan, carry_shifts


def complex_mul(a: Tensor, b: Tensor) -> Tensor:
    """Product of complex numbers held as (..., 2)."""
    (ar, ai), (br, bi) = a.unbind(-1), b.unbind(-1)
    return torch.stack([ar * br - ai * bi, ar * bi + ai * br], dim=-1)


def powers_of_q(log_magnitude: Tensor, turns: Tensor, exponents: Tensor) -> Tensor:
    """q^r as (..., 2) for log|q| and arg(q) / 2 pi, broadcast against integer exponents r >= 0.

    `turns` is float64: the phase is reduced to one turn before it is rounded, so r may be large.
    """
    exponents = exponents.double()
    angle = exponents * turns
    angle = cast((angle - angle.floor()) * (2 * math.pi), log_magnitude.dtype)
    magnitude = torch.exp(cast(exponents, log_magnitude.dtype) * log_magnitude)
    return torch.stack([magnitude * torch.cos(angle), magnitude * torch.sin(angle)], dim=-1)


class ComplexEMA(DerivedConstants):
    """Complex EMA over D channels with N modes each; parameters as in the original."""

    def __init__(self, dim: int, ndim: int, form: EMAForm = "blocked") -> None:
        super().__init__()
        self.dim, self.ndim, self.form = dim, ndim, form
        self.alpha = nn.Parameter(torch.zeros(dim, ndim, 1))
        self.delta = nn.Parameter(torch.zeros(dim, ndim, 1))
        self.theta = nn.Parameter(torch.zeros(dim, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(dim, ndim, 2))
        self.omega = nn.Parameter(torch.zeros(dim, 1))

    def derive(self) -> dict[str, Tensor]:
        """p (D, N), q and gamma (D, N, 2), omega (D), log|q| and turns (D, N), kernel K[0..T) (D, T), from float64.

        `planes` (7, N, D) are p, q, gamma and q^S once more, for the scan over segments of S tokens.
        """
        dtype = accumulation_dtype(self.alpha.dtype)
        p = torch.sigmoid(self.alpha.double()[..., 0])
        log_magnitude = torch.log1p(-p * torch.sigmoid(self.delta.double()[..., 0]))
        modes = torch.arange(1, self.ndim + 1, dtype=torch.float64, device=p.device) / self.ndim
        turns = torch.sigmoid(self.theta.double()[..., 0]) * modes  # theta_n = n * base * 2 pi / N
        q = powers_of_q(log_magnitude, turns, torch.ones((), device=p.device))
        gamma = self.gamma.double() / math.sqrt(self.ndim)
        omega = self.omega.double()[:, 0]
        steps = torch.arange(BLOCK, device=p.device)[:, None]
        powers = powers_of_q(log_magnitude[:, None], turns[:, None], steps)  # (D, T, N, 2)
        kernel = (complex_mul(powers, gamma[:, None])[..., 0] * p[:, None]).sum(-1)
        kernel = torch.cat([kernel[:, :1] + omega[:, None], kernel[:, 1:]], dim=1)
        leap = powers_of_q(log_magnitude, turns, torch.full((), SEGMENT, device=p.device))
        planes = torch.cat([p[..., None], q, gamma, leap], dim=-1).permute(2, 1, 0)  # (7, N, D)
        constants = {"p": p, "q": q, "gamma": gamma, "omega": omega, "log_magnitude": log_magnitude, "kernel": kernel}
        constants["planes"] = planes
        return {**{name: tensor.to(dtype) for name, tensor in constants.items()}, "turns": turns}

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step: x (B, D), state (B, D, N, 2) -> y (B, D) in the accumulation dtype, new state."""
        c = self.constants()
        x = cast(x, c["p"].dtype)
        (re, im), (q_re, q_im), (g_re, g_im) = state.unbind(-1), c["q"].unbind(-1), c["gamma"].unbind(-1)
        new_re = q_re * re - q_im * im + c["p"] * x[..., None]
        new_im = q_re * im + q_im * re
        y = (g_re * new_re - g_im * new_im).sum(-1) + c["omega"] * x
        return y, torch.stack([new_re, new_im], dim=-1)

    def forward(self, x: Tensor, plan: PrefillPlan, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Prefill: x (B, L, D), 0 where not valid; state (B, D, N, 2) or None (zero).

        Returns y (B, L, D) in the accumulation dtype and the state after each row's last valid step.
        """
        c = self.constants()
        x = cast(x, c["p"].dtype)
        batch, length, dim = x.shape
        if state is None:
            state = x.new_zeros(batch, dim, self.ndim, 2)
        padded = to_blocks(x, 1, BLOCK)  # (B, blocks, T, D)
        count = padded.shape[1]
        blocks = compact(padded.permute(3, 0, 1, 2)).flatten(1, 2)  # (D, B*blocks, T), as batched products want it

        powers = powers_of_q(c["log_magnitude"][:, None], c["turns"][:, None], plan.exponents)
        decays = powers[:, BLOCK + 1 :]  # of q over 1, 2, 4 ... blocks
        to_state = (powers[:, :BLOCK].flip(1) * c["p"][:, None, :, None]).flatten(2)  # (D, T, 2N)
        added = torch.bmm(blocks, to_state).unflatten(-1, (self.ndim, 2))
        # State at the start of every block: prefix sums of what blocks add, decayed by q^T a block, by doubling.
        carried = torch.cat([state.transpose(0, 1)[:, :, None], added.unflatten(1, (batch, count))[:, :, :-1]], dim=2)
        for i, shift in enumerate(carry_shifts(plan.max_length)):
            earlier = first(F.pad(carried, (0, 0, 0, 0, shift, 0)), 2, count)
            carried = carried + complex_mul(earlier, decays[:, None, None, i])

        from_state = real_part_weights(complex_mul(powers[:, 1 : BLOCK + 1], c["gamma"][:, None]))  # (D, 2N, T)
        if self.form == "blocked":
            inside = torch.bmm(blocks, toeplitz(c["kernel"], plan))
            y = torch.baddbmm(inside, carried.flatten(1, 2).flatten(2), from_state)
            y = from_blocks(y.unflatten(1, (batch, count)).permute(1, 2, 3, 0), 1, length)
        else:
            y = self._convolve(x, state, powers, from_state, c)

        # Each row's own last state: from the start of its last block, over that block's valid tokens.
        tail = torch.where(plan.tail_valid, padded.flatten(1, 2)[plan.rows[:, None], plan.tail_index], 0.0)  # (B, T, D)
        added = torch.bmm(tail.permute(2, 0, 1), to_state).unflatten(-1, (self.ndim, 2))
        start = carried[:, plan.rows, plan.last_block]  # (D, B, N, 2)
        last = complex_mul(powers.index_select(1, plan.last_steps), start) + added
        return y, last.transpose(0, 1)

    def _convolve(self, x: Tensor, state: Tensor, powers: Tensor, from_state: Tensor, c: dict[str, Tensor]) -> Tensor:
        """y by FFT of size 2L: the kernel over the whole length, and what the incoming state adds, in two levels."""
        batch, length, _ = x.shape
        count = (length + BLOCK - 1) // BLOCK
        starts = torch.arange(count, device=x.device)[:, None] * BLOCK
        starts = powers_of_q(c["log_magnitude"][:, None], c["turns"][:, None], starts)  # q^(T b): (D, blocks, N, 2)
        gamma_powers = real_part_weights(complex_mul(powers[:, :BLOCK], c["gamma"][:, None]))
        kernel = torch.bmm((starts * c["p"][:, None, :, None]).flatten(2), gamma_powers)
        kernel = from_blocks(kernel, 1, length)
        size = 2 * length
        spectrum = torch.fft.rfft(x, n=size, dim=1) * torch.fft.rfft(kernel, n=size, dim=1).mT
        y = first(torch.fft.irfft(spectrum, n=size, dim=1), 1, length)
        decayed = complex_mul(state.transpose(0, 1)[:, :, None], starts[:, None])  # (D, B, blocks, N, 2)
        incoming = torch.bmm(decayed.flatten(1, 2).flatten(2), from_state).unflatten(1, (batch, count))
        return y + from_blocks(incoming.permute(1, 2, 3, 0), 1, length) + c["omega"] * x


def real_part_weights(coefficients: Tensor) -> Tensor:
    """Coefficients g (D, T, N, 2) -> (D, 2N, T), which times a state (2N) gives Re(sum_n g h)."""
    return torch.stack([coefficients[..., 0], -coefficients[..., 1]], dim=-1).flatten(2).mT


def toeplitz(kernel: Tensor, plan: PrefillPlan) -> Tensor:
    """K (D, T) -> (D, T, T) with K[j - i] at [i, j] for i <= j, else 0."""
    return torch.where(plan.upper, kernel[:, plan.lag], 0.0)
