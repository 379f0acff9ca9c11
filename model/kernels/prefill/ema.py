"""The complex EMA (CEMA) of a prefill as a scan over segments of S tokens, then RMSNorm.

    megalodon_ema_local     what each segment adds to the state, starting from zero
    megalodon_ema_carry     the state at the start of every segment, one segment after the other, by q^S
    megalodon_ema_scan      y from there, and the state after a row's last token
    megalodon_rms_norm      (`norms.py`)

The recurrence runs in time, one thread a channel, with p taken out of it: h / p <- q h / p + x. That is 6 operations a
mode and token with y, and 3 without, two tokens at a time. The only powers of q are q^2, and q^S, which comes from
magnitude and phase. Tokens at or beyond a row's length change nothing and give zeros.

`scan_coefficients` (7, N, D) are planes (N, D): p, Re q, Im q, Re gamma, Im gamma, Re q^S, Im q^S (`model/ema.py`,
whose `ComplexEMA.forward` is the plain form).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from ...plan import SEGMENT
from ..launch import grid_dependency_wait, launch, launch_dependents, next_power_of_2, supports_pdl
from . import WIDE_DIM
from .norms import megalodon_rms_norm

_CHANNELS = 32  # of the scan in one program: one warp, a thread a channel
_CARRY_BLOCK = 128  # modes and channels that one program carries


def ema_scan_reference(
    x: Tensor,
    lengths: Tensor,
    state: Tensor,
    scan_coefficients: Tensor,
    omega: Tensor,
    scale: Tensor | None,
    eps: float,
) -> Tensor:
    """Token by token: m (B, L, D), zeros where not valid; state (B, D, N, 2) changes in place."""
    p, q_re, q_im, g_re, g_im = scan_coefficients[:5].mT  # (D, N) each
    m = torch.zeros_like(x)
    for t in range(x.shape[1]):
        rows = (t < lengths).nonzero()[:, 0]  # those for which token t is valid
        u, (re, im) = x[rows, t].float(), state[rows].unbind(-1)
        re, im = q_re * re - q_im * im + p * u[..., None], q_re * im + q_im * re
        state[rows] = torch.stack([re, im], -1)
        y = (g_re * re - g_im * im).sum(-1) + omega * u
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        m[rows, t] = (y if scale is None else y * (scale.float() + 1)).to(x.dtype)
    return m


@triton_op("megalodon::ema_scan", mutates_args={"state"})
def ema_scan(
    x: Tensor,
    lengths: Tensor,
    state: Tensor,
    scan_coefficients: Tensor,
    omega: Tensor,
    scale: Tensor | None,
    eps: float,
) -> Tensor:
    """Complex EMA of new tokens, then RMSNorm: m (B, L, D), zeros where not valid.

    x (B, L, D); lengths (B) int64; scan_coefficients (7, N, D) and omega (D) float32; scale (D) of the RMSNorm or
    None. state (B, D, N, 2) float32 changes in place. Wide models scan segments twice as long: half of the memory for
    states, and half of the time to carry them on.
    """
    batch, length, dim = x.shape
    ndim = scan_coefficients.shape[1]
    doublings = 0 if dim < WIDE_DIM else 1
    segment = SEGMENT << doublings
    segments = (length + segment - 1) // segment
    states = x.new_empty(batch, segments, 2, ndim, dim, dtype=torch.float32)
    y = x.new_empty(batch, length, dim, dtype=torch.float32)
    m = torch.empty_like(x)
    pdl = supports_pdl(x)
    grid = (-(-dim // _CHANNELS), segments, batch)
    sizes: dict[str, Any] = {"D": dim, "N": ndim, "N_P": next_power_of_2(ndim), "CHANNELS": _CHANNELS}
    sizes |= {"S": segment, "PDL": pdl, "num_warps": 1}
    launch(megalodon_ema_local, grid)(x, lengths, scan_coefficients, states, length, **sizes)
    launch(megalodon_ema_carry, (-(-dim * ndim // _CARRY_BLOCK), batch))(
        *(states, state, lengths, scan_coefficients, segments),
        **{"D": dim, "N": ndim, "BLOCK": _CARRY_BLOCK, "S": segment, "DOUBLINGS": doublings, "PDL": pdl},
        num_warps=4,
    )
    launch(megalodon_ema_scan, grid)(x, lengths, scan_coefficients, omega, states, y, state, length, **sizes)
    launch(megalodon_rms_norm, (length, batch))(
        *(y, lengths, y if scale is None else scale, m, length, eps),
        **{"D": dim, "D_P": next_power_of_2(dim), "AFFINE": scale is not None, "PDL": pdl},
        num_warps=4,
    )
    return m


@triton.jit
def load_plane(plane_ptr, channel, ok, D: tl.constexpr, N: tl.constexpr, N_P: tl.constexpr):
    """A plane (N, D) at some channels: (N_P, channels)."""
    mode = tl.arange(0, N_P)
    mask = (mode < N)[:, None] & ok[None, :]
    return tl.load(plane_ptr + mode[:, None] * D + channel[None, :], mask=mask, other=0.0)


@triton.jit
def load_p(coefficients_ptr, channel, ok, D: tl.constexpr, N: tl.constexpr, N_P: tl.constexpr):
    """p (N_P, channels), by which the recurrence is divided: at least 1e-30, which is as good as 0."""
    return tl.maximum(load_plane(coefficients_ptr, channel, ok, D, N, N_P), 1e-30)


@triton.jit
def thread_channels(block, length, CHANNELS: tl.constexpr):
    """The CHANNELS channels of a program, one a thread.

    `length` hides from the compiler that addresses are aligned. If it knew, it would give a thread four neighbouring
    channels and a quarter of their modes, and every sum over modes would go through other threads: three times slower.
    """
    zero = (length < 0).to(tl.int32)
    return block * CHANNELS + zero + tl.arange(0, CHANNELS)


@triton.jit
def load_four_tokens(rows, ok, step, steps, D: tl.constexpr):
    """x of tokens step .. step + 3 of each channel as it is stored; zeros if `step` is `steps` or more."""
    ok = ok & (step < steps)
    x0 = tl.load(rows + step * D, mask=ok, other=0.0)
    x1 = tl.load(rows + (step + 1) * D, mask=ok, other=0.0)
    x2 = tl.load(rows + (step + 2) * D, mask=ok, other=0.0)
    x3 = tl.load(rows + (step + 3) * D, mask=ok, other=0.0)
    return x0, x1, x2, x3


@triton.jit
def advance_two(x0, x1, re, im, q_re, q_im, q2_re, q2_im):
    """Two tokens at once, six operations a mode: h <- q^2 h + q x0 + x1, with h as re, im (N_P, channels)."""
    x0, x1 = x0.to(tl.float32)[None, :], x1.to(tl.float32)[None, :]
    return q2_re * re + (q_re * x0 + (x1 - q2_im * im)), q2_re * im + (q2_im * re + q_im * x0)


@triton.jit
def emit_token(x, re, im, q_re, q_im, g_re, g_im, omega, y, ok):
    """One token: h <- q h + x, and Re(sum_n gamma_n h_n) + omega x, stored at y (channels)."""
    x = x.to(tl.float32)
    re, im = q_re * re + (x[None, :] - q_im * im), q_re * im + q_im * re
    # Two sums, so that each is made of fused multiply-adds.
    tl.store(y, tl.sum(g_re * re, 0) - tl.sum(g_im * im, 0) + omega * x, mask=ok)
    return re, im


@triton.jit
def megalodon_ema_local(
    x_ptr, lengths_ptr, coefficients_ptr, states_ptr,
    L,
    D: tl.constexpr, N: tl.constexpr, N_P: tl.constexpr, CHANNELS: tl.constexpr, S: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The state after each segment of S tokens that starts from zero; a row's last segment is left out.

    In: x (B, L, D); lengths (B); coefficients (7, N, D). Out: states (B, segments, 2, N, D) float32.
    Grid: (ceil(D / CHANNELS), segments, B), one warp. q, q^2, the state (N_P, CHANNELS) and the next four tokens stay
    in registers.
    """
    launch_dependents(PDL)
    segment = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    grid_dependency_wait(PDL)
    length = tl.load(lengths_ptr + b)
    channel = thread_channels(tl.program_id(0), length, CHANNELS)
    ok = channel < D
    PLANE: tl.constexpr = N * D
    q_re = load_plane(coefficients_ptr + PLANE, channel, ok, D, N, N_P)
    q_im = load_plane(coefficients_ptr + 2 * PLANE, channel, ok, D, N, N_P)
    q2_re, q2_im = q_re * q_re - q_im * q_im, 2.0 * q_re * q_im
    re = tl.zeros((N_P, CHANNELS), tl.float32)
    im = tl.zeros((N_P, CHANNELS), tl.float32)
    if (segment + 1) * S < length:
        rows = x_ptr + (b * L + segment * S) * D + channel
        a0, a1, a2, a3 = load_four_tokens(rows, ok, 0, S, D)
        for step in range(0, S, 4):
            b0, b1, b2, b3 = load_four_tokens(rows, ok, step + 4, S, D)  # they load while these are added
            re, im = advance_two(a0, a1, re, im, q_re, q_im, q2_re, q2_im)
            re, im = advance_two(a2, a3, re, im, q_re, q_im, q2_re, q2_im)
            a0, a1, a2, a3 = b0, b1, b2, b3
        states = states_ptr + (b * tl.num_programs(1) + segment) * (2 * PLANE)
        mode = tl.arange(0, N_P)
        at = mode[:, None] * D + channel[None, :]
        at_ok = (mode < N)[:, None] & ok[None, :]
        p = load_p(coefficients_ptr, channel, ok, D, N, N_P)
        tl.store(states + at, p * re, mask=at_ok)
        tl.store(states + PLANE + at, p * im, mask=at_ok)


@triton.jit
def load_addition(entry, segment, full, ok, PLANE: tl.constexpr):
    """A segment's addition to the state, real and imaginary; 0 for segments from number `full` on."""
    place = entry + tl.cast(segment, tl.int64) * (2 * PLANE)
    ok = ok & (segment < full)
    return tl.load(place, mask=ok, other=0.0), tl.load(place + PLANE, mask=ok, other=0.0)


@triton.jit
def carry_segment(entry, segment, count, ok, re, im, q_pow_re, q_pow_im, add_re, add_im, PLANE: tl.constexpr):
    """Store the state at the start of a segment if there is one; -> the state at its end, h <- q^S h + addition."""
    place = entry + tl.cast(segment, tl.int64) * (2 * PLANE)
    tl.store(place, re, mask=ok & (segment < count))
    tl.store(place + PLANE, im, mask=ok & (segment < count))
    return q_pow_re * re - q_pow_im * im + add_re, q_pow_re * im + q_pow_im * re + add_im


@triton.jit
def megalodon_ema_carry(
    states_ptr, incoming_ptr, lengths_ptr, coefficients_ptr,
    segments,
    D: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, S: tl.constexpr, DOUBLINGS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """In place: what each segment adds -> the state at the start of each segment.

    In and out: states (B, segments, 2, N, D). In: incoming (B, D, N, 2), the state before the first token; lengths
    (B); coefficients (7, N, D), whose q^SEGMENT is squared DOUBLINGS times to make q^S. Grid: (ceil(N D / BLOCK), B),
    BLOCK pairs of mode and channel a program. The state, q^S and the next four additions stay in registers.
    """
    launch_dependents(PDL)
    PLANE: tl.constexpr = N * D
    b = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = at < PLANE
    q_re = tl.load(coefficients_ptr + 5 * PLANE + at, mask=ok, other=0.0)
    q_im = tl.load(coefficients_ptr + 6 * PLANE + at, mask=ok, other=0.0)
    for _ in tl.static_range(DOUBLINGS):
        q_re, q_im = q_re * q_re - q_im * q_im, 2.0 * q_re * q_im
    grid_dependency_wait(PDL)
    full = (tl.maximum(tl.load(lengths_ptr + b), 1) - 1) // S  # segments that another one follows
    pair = incoming_ptr + b * (2 * PLANE) + (at % D * N + at // D) * 2
    re = tl.load(pair, mask=ok, other=0.0)
    im = tl.load(pair + 1, mask=ok, other=0.0)
    entry = states_ptr + b * segments * (2 * PLANE) + at
    count = tl.minimum(full + 1, segments)
    a0, c0 = load_addition(entry, 0, full, ok, PLANE)
    a1, c1 = load_addition(entry, 1, full, ok, PLANE)
    a2, c2 = load_addition(entry, 2, full, ok, PLANE)
    a3, c3 = load_addition(entry, 3, full, ok, PLANE)
    for segment in range(0, count, 4):
        b0, d0 = load_addition(entry, segment + 4, full, ok, PLANE)  # they load while these four are computed
        b1, d1 = load_addition(entry, segment + 5, full, ok, PLANE)
        b2, d2 = load_addition(entry, segment + 6, full, ok, PLANE)
        b3, d3 = load_addition(entry, segment + 7, full, ok, PLANE)
        re, im = carry_segment(entry, segment, count, ok, re, im, q_re, q_im, a0, c0, PLANE)
        re, im = carry_segment(entry, segment + 1, count, ok, re, im, q_re, q_im, a1, c1, PLANE)
        re, im = carry_segment(entry, segment + 2, count, ok, re, im, q_re, q_im, a2, c2, PLANE)
        re, im = carry_segment(entry, segment + 3, count, ok, re, im, q_re, q_im, a3, c3, PLANE)
        a0, a1, a2, a3, c0, c1, c2, c3 = b0, b1, b2, b3, d0, d1, d2, d3


@triton.jit
def megalodon_ema_scan(
    x_ptr, lengths_ptr, coefficients_ptr, omega_ptr, states_ptr, y_ptr, final_ptr,
    L,
    D: tl.constexpr, N: tl.constexpr, N_P: tl.constexpr, CHANNELS: tl.constexpr, S: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y of every valid token from the state at its segment's start, and the state after each row's last token.

    In: x (B, L, D); lengths (B); coefficients (7, N, D); omega (D); states (B, segments, 2, N, D). Out: y (B, L, D)
    float32; final (B, D, N, 2) float32. Grid: (ceil(D / CHANNELS), segments, B), one warp. q, p gamma, the state
    (N_P, CHANNELS) and the next four tokens stay in registers.
    """
    launch_dependents(PDL)
    segment = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    grid_dependency_wait(PDL)
    length = tl.load(lengths_ptr + b)
    channel = thread_channels(tl.program_id(0), length, CHANNELS)
    ok = channel < D
    PLANE: tl.constexpr = N * D
    p = load_p(coefficients_ptr, channel, ok, D, N, N_P)
    q_re = load_plane(coefficients_ptr + PLANE, channel, ok, D, N, N_P)
    q_im = load_plane(coefficients_ptr + 2 * PLANE, channel, ok, D, N, N_P)
    g_re = p * load_plane(coefficients_ptr + 3 * PLANE, channel, ok, D, N, N_P)
    g_im = p * load_plane(coefficients_ptr + 4 * PLANE, channel, ok, D, N, N_P)
    omega = tl.load(omega_ptr + channel, mask=ok, other=0.0)
    steps = tl.minimum(length - segment * S, S).to(tl.int32)
    if steps > 0:
        states = states_ptr + (b * tl.num_programs(1) + segment) * (2 * PLANE)
        re = load_plane(states, channel, ok, D, N, N_P) / p
        im = load_plane(states + PLANE, channel, ok, D, N, N_P) / p
        rows = x_ptr + (b * L + segment * S) * D + channel
        out = y_ptr + (b * L + segment * S) * D + channel
        whole = steps // 4 * 4
        a0, a1, a2, a3 = load_four_tokens(rows, ok, 0, whole, D)
        for step in range(0, whole, 4):
            b0, b1, b2, b3 = load_four_tokens(rows, ok, step + 4, whole, D)
            y = out + step * D
            re, im = emit_token(a0, re, im, q_re, q_im, g_re, g_im, omega, y, ok)
            re, im = emit_token(a1, re, im, q_re, q_im, g_re, g_im, omega, y + D, ok)
            re, im = emit_token(a2, re, im, q_re, q_im, g_re, g_im, omega, y + 2 * D, ok)
            re, im = emit_token(a3, re, im, q_re, q_im, g_re, g_im, omega, y + 3 * D, ok)
            a0, a1, a2, a3 = b0, b1, b2, b3
        for step in range(whole, steps):
            x = tl.load(rows + step * D, mask=ok, other=0.0)
            re, im = emit_token(x, re, im, q_re, q_im, g_re, g_im, omega, out + step * D, ok)
        if length <= (segment + 1) * S:
            mode = tl.arange(0, N_P)
            pair = final_ptr + b * (2 * PLANE) + (channel[None, :] * N + mode[:, None]) * 2
            pair_ok = (mode < N)[:, None] & ok[None, :]
            # p is loaded again: kept since its first use, it would take registers all along.
            p = load_p(coefficients_ptr, channel, ok, D, N, N_P)
            tl.store(pair, p * re, mask=pair_ok)
            tl.store(pair + 1, p * im, mask=pair_ok)
