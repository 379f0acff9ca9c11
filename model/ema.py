"""The complex exponential moving average (CEMA): one-step recurrence, and prefill in blocks or by FFT.

    h_t = q * h_{t-1} + p * x_t        y_t = Re(sum_n gamma_n h_t,n) + omega * x_t          (arXiv 2404.08801, eq. 4-6)

h_t is one complex number for each of D channels and N modes. Prefill works on blocks of T tokens; for each channel:

    inside a block   y = x K,  K[i, j] = Re(sum gamma p q^(j-i)) for i <= j (Toeplitz; omega on the diagonal)
    block's state    s = p * sum_j q^(T-1-j) x_j
    carried state    H_b = q^T H_{b-1} + s_{b-1}     by doubling: log2(blocks) steps
    from the state   y_j += Re(sum_n gamma_n q_n^(j+1) H_b,n)     for token j = 0..T-1 of the block

The FFT form computes y in another way: one causal convolution over the whole length, plus the contribution of the state
before the call. Both forms compute the states between blocks, and the last state, alike.
Complex numbers are pairs (real, imaginary) in a last dimension of 2. Powers of q come from magnitude and phase.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocking import compact, first, from_blocks, to_blocks
from .config import BLOCK, EMAForm
from .constants import DerivedConstants
from .norm import accumulation_dtype, cast
from .plan import SEGMENT, PrefillPlan, carry_shifts


def complex_mul(a: Tensor, b: Tensor) -> Tensor:
    """Product of complex numbers held as (..., 2)."""
    (ar, ai), (br, bi) = a.unbind(-1), b.unbind(-1)
    return torch.stack([ar * br - ai * bi, ar * bi + ai * br], dim=-1)


def powers_of_q(log_magnitude: Tensor, phase_cycles: Tensor, exponents: Tensor) -> Tensor:
    """q^r as (..., 2) from log|q| and `phase_cycles` = arg(q) / 2 pi, broadcast against integer exponents r >= 0.

    `phase_cycles` is float64, and the phase is reduced to one cycle before it is rounded, so r may be large.
    """
    exponents = exponents.double()
    angle = exponents * phase_cycles
    angle = cast((angle - angle.floor()) * (2 * math.pi), log_magnitude.dtype)
    magnitude = torch.exp(cast(exponents, log_magnitude.dtype) * log_magnitude)
    return torch.stack([magnitude * torch.cos(angle), magnitude * torch.sin(angle)], dim=-1)


class ComplexEMA(DerivedConstants):
    """Complex EMA over D channels with N modes each; parameters as in the original."""

    def __init__(self, dim: int, ndim: int, form: EMAForm = "blocked") -> None:
        super().__init__()
        self.dim, self.ndim, self.form = dim, ndim, form
        # bfloat16 rounding of theta accumulates as phase error over long texts, so the parameters stay in float32 where
        # the default dtype is a half precision.
        dtype = accumulation_dtype(torch.get_default_dtype())
        self.alpha = nn.Parameter(torch.zeros(dim, ndim, 1, dtype=dtype))
        self.delta = nn.Parameter(torch.zeros(dim, ndim, 1, dtype=dtype))
        self.theta = nn.Parameter(torch.zeros(dim, 1, 1, dtype=dtype))
        self.gamma = nn.Parameter(torch.zeros(dim, ndim, 2, dtype=dtype))
        self.omega = nn.Parameter(torch.zeros(dim, 1, dtype=dtype))

    def derive(self) -> dict[str, Tensor]:
        """The coefficients of the recurrence and of its blocks, computed in float64.

        p (D, N), q and gamma (D, N, 2), omega (D), log|q| and phase_cycles (D, N), the convolution kernel K[0..T)
        (D, T). `scan_coefficients` (7, N, D) hold p, q, gamma and q^SEGMENT again (real and imaginary parts apart), in
        the order in which the GPU kernels read them.
        """
        dtype = accumulation_dtype(self.alpha.dtype)
        p = torch.sigmoid(self.alpha.double()[..., 0])
        log_magnitude = torch.log1p(-p * torch.sigmoid(self.delta.double()[..., 0]))
        modes = torch.arange(1, self.ndim + 1, dtype=torch.float64, device=p.device) / self.ndim
        phase_cycles = torch.sigmoid(self.theta.double()[..., 0]) * modes  # theta_n = n * base * 2 pi / N
        q = powers_of_q(log_magnitude, phase_cycles, torch.ones((), device=p.device))
        gamma = self.gamma.double() / math.sqrt(self.ndim)
        omega = self.omega.double()[:, 0]
        steps = torch.arange(BLOCK, device=p.device)[:, None]
        powers = powers_of_q(log_magnitude[:, None], phase_cycles[:, None], steps)  # (D, T, N, 2)
        kernel = (complex_mul(powers, gamma[:, None])[..., 0] * p[:, None]).sum(-1)
        kernel = torch.cat([kernel[:, :1] + omega[:, None], kernel[:, 1:]], dim=1)
        q_pow_segment = powers_of_q(log_magnitude, phase_cycles, torch.full((), SEGMENT, device=p.device))
        scan_coefficients = torch.cat([p[..., None], q, gamma, q_pow_segment], dim=-1).permute(2, 1, 0)  # (7, N, D)
        constants = {"p": p, "q": q, "gamma": gamma, "omega": omega, "log_magnitude": log_magnitude, "kernel": kernel}
        constants["scan_coefficients"] = scan_coefficients
        return {**{name: tensor.to(dtype) for name, tensor in constants.items()}, "phase_cycles": phase_cycles}

    def initial_state(self, x: Tensor) -> Tensor:
        """The state (B, D, N, 2) before the first token of x (B, L, D): zeros, in the accumulation dtype."""
        return x.new_zeros(x.shape[0], self.dim, self.ndim, 2, dtype=accumulation_dtype(x.dtype))

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

        Returns y (B, L, D) in the accumulation dtype and the state after each row's last valid token.
        """
        if not torch.is_autocast_enabled(x.device.type):
            return self._prefill(x, plan, state)
        with torch.autocast(x.device.type, enabled=False):  # which would round the products to bfloat16
            return self._prefill(x, plan, state)

    def _prefill(self, x: Tensor, plan: PrefillPlan, state: Tensor | None) -> tuple[Tensor, Tensor]:
        c = self.constants()
        x = cast(x, c["p"].dtype)
        length = x.shape[1]
        if state is None:
            state = self.initial_state(x)
        scan = scan_blocks(c, x, plan, state)
        if self.form == "blocked":
            inside = torch.bmm(scan.blocks, toeplitz(c["kernel"], plan))
            y = torch.baddbmm(inside, scan.carried.flatten(1, 2).flatten(2), scan.from_state(c))
            y = from_blocks(y.unflatten(1, scan.padded.shape[:2]).permute(1, 2, 3, 0), 1, length)
        else:
            if torch.is_grad_enabled():
                state = state.clone()  # autograd keeps it, and a cache's is overwritten in place
            starts = block_powers(c, length, x.device)
            y = causal_convolution(x, convolution_kernel(c, scan.powers, starts, length))
            y = y + from_incoming(state, scan.from_state(c), starts, length) + c["omega"] * x
        return y, scan.last_state(plan)


class Scan(NamedTuple):
    """The result of `scan_blocks`: powers of q, the tokens in blocks, and the states between the blocks."""

    powers: Tensor  # (D, T + 1 + shifts, N, 2): the plan's exponents of q
    padded: Tensor  # (B, blocks, T, D)
    blocks: Tensor  # (D, B * blocks, T): the same, as batched products want it
    to_state: Tensor  # (D, T, 2N): times a token of a block, what it adds to the state at the block's end
    carried: Tensor  # (D, B, blocks, N, 2): the state at the start of every block

    def from_state(self, c: dict[str, Tensor]) -> Tensor:
        """(D, 2N, T): times the state at the start of a block, what that state adds to the block's outputs."""
        return real_part_weights(complex_mul(self.powers[:, 1 : BLOCK + 1], c["gamma"][:, None]))

    def last_state(self, plan: PrefillPlan) -> Tensor:
        """Each row's own last state (B, D, N, 2): from the start of its last block, over that block's valid tokens."""
        picked = self.padded.flatten(1, 2)[plan.tokens.rows[:, None], plan.ema.tail_index]
        tail = torch.where(plan.ema.tail_valid, picked, 0.0)  # (B, T, D)
        added = torch.bmm(tail.permute(2, 0, 1), self.to_state).unflatten(-1, (-1, 2))
        start = self.carried[:, plan.tokens.rows, plan.ema.last_block]  # (D, B, N, 2)
        last = complex_mul(self.powers.index_select(1, plan.ema.last_count), start) + added
        return last.transpose(0, 1)


def scan_blocks(c: dict[str, Tensor], x: Tensor, plan: PrefillPlan, state: Tensor) -> Scan:
    """The states between the blocks of x (B, L, D) from `state` (B, D, N, 2); `c` are the constants of `derive`."""
    batch, ndim = x.shape[0], state.shape[2]
    padded = to_blocks(x, 1, BLOCK)
    count = padded.shape[1]
    blocks = compact(padded.permute(3, 0, 1, 2)).flatten(1, 2)
    powers = powers_of_q(c["log_magnitude"][:, None], c["phase_cycles"][:, None], plan.ema.exponents)
    decays = powers[:, BLOCK + 1 :]  # q^T, q^2T, q^4T ...
    to_state = (powers[:, :BLOCK].flip(1) * c["p"][:, None, :, None]).flatten(2)
    added = torch.bmm(blocks, to_state).unflatten(-1, (ndim, 2))
    # The state at the start of every block is a prefix sum of the blocks' states, decayed by q^T a block, by doubling.
    # Real and imaginary parts are apart, since compilers for CPUs do not vectorise pairs.
    # The last block's state is cut off after `cat`, not before: a compiled graph of two blocks would have a size of 1.
    carried = torch.cat([state.transpose(0, 1)[:, :, None], added.unflatten(1, (batch, count))], dim=2)
    re, im = first(carried, 2, count).unbind(-1)
    for i, shift in enumerate(carry_shifts(plan.max_length)):
        earlier_re, earlier_im = (first(F.pad(part, (0, 0, shift, 0)), 2, count) for part in (re, im))
        decay_re, decay_im = decays[:, None, None, i].unbind(-1)
        re = re + (earlier_re * decay_re - earlier_im * decay_im)
        im = im + (earlier_re * decay_im + earlier_im * decay_re)
    return Scan(powers, padded, blocks, to_state, torch.stack([re, im], dim=-1))


def block_powers(c: dict[str, Tensor], length: int, device: torch.device) -> Tensor:
    """q^(T b) for every block b of a length: (D, blocks, N, 2)."""
    starts = torch.arange((length + BLOCK - 1) // BLOCK, device=device)[:, None] * BLOCK
    return powers_of_q(c["log_magnitude"][:, None], c["phase_cycles"][:, None], starts)


def convolution_kernel(c: dict[str, Tensor], powers: Tensor, starts: Tensor, length: int) -> Tensor:
    """K[s] = Re(sum_n gamma p q^s) for s < L, (D, L), from `powers` q^0 .. q^T and `starts`, those at block starts."""
    gamma_powers = real_part_weights(complex_mul(powers[:, :BLOCK], c["gamma"][:, None]))
    kernel = torch.bmm((starts * c["p"][:, None, :, None]).flatten(2), gamma_powers)
    return from_blocks(kernel, 1, length)


def causal_convolution(x: Tensor, kernel: Tensor) -> Tensor:
    """y_t = sum_{s <= t} K[s] x_{t-s} by FFT of size 2L: x (B, L, D), kernel (D, L) -> (B, L, D)."""
    length = x.shape[1]
    size = 2 * length
    spectrum = torch.fft.rfft(x, n=size, dim=1) * torch.fft.rfft(kernel, n=size, dim=1).mT
    return first(torch.fft.irfft(spectrum, n=size, dim=1), 1, length)


def from_incoming(state: Tensor, from_state: Tensor, starts: Tensor, length: int) -> Tensor:
    """The state's part of the outputs (B, L, D): Re(sum_n gamma q^(t+1) h) at t = 0..L-1, state h (B, D, N, 2)."""
    decayed = complex_mul(state.transpose(0, 1)[:, :, None], starts[:, None])  # (D, B, blocks, N, 2)
    incoming = torch.bmm(decayed.flatten(1, 2).flatten(2), from_state).unflatten(1, (state.shape[0], starts.shape[1]))
    return from_blocks(incoming.permute(1, 2, 3, 0), 1, length)


def real_part_weights(coefficients: Tensor) -> Tensor:
    """Coefficients g (D, T, N, 2) -> (D, 2N, T): times a state (2N), they give Re(sum_n g h)."""
    return torch.stack([coefficients[..., 0], -coefficients[..., 1]], dim=-1).flatten(2).mT


def toeplitz(kernel: Tensor, plan: PrefillPlan) -> Tensor:
    """K (D, T) -> (D, T, T) with K[j - i] at [i, j] for i <= j, else 0."""
    return torch.where(plan.ema.upper, kernel[:, plan.ema.lag], 0.0)
