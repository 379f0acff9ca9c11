"""Kernels of a prefill that run over time: TimestepNorm's statistics, and the complex EMA as a scan over segments.

    moments   mean and variance inside each group at every step, and their sums over a segment of S tokens (float64)
    norm      running statistics of every step from the sums before it, and x_norm
    local     what each segment adds to the EMA's state, from nothing
    carry     the state at the start of every segment, one after the other, by q^S
    scan      y from there, and the state after a row's last token

The recurrence runs in time, a thread a channel, with p taken out of it: h / p <- q h / p + x. That is 6 operations a
mode and token with y, and 3 without, two tokens at a time; no powers of q but q^2, and q^S, which comes from a power
that magnitude and phase gave. Steps at or beyond a row's length change nothing and give zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import inverse_root, start, wait


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
def megalodon_moments(
    x_ptr,
    lengths_ptr,
    mu_ptr,
    var_ptr,
    sums_ptr,
    L,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    GROUPS: tl.constexpr,
    HF: tl.constexpr,
    S: tl.constexpr,
    PDL: tl.constexpr,
):
    """x (B, L, D) -> mu, var (B, L, G) inside each group; sums (B, segments, 2, G) float64 of mu and var + mu^2."""
    start(PDL)
    segment = tl.program_id(0)
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    b = tl.program_id(2).to(tl.int64)
    token = segment * S + tl.arange(0, S)
    at, ok = group_tile(g, L, token, G, GROUP, GROUPS, GROUP_P, S)
    wait(PDL)
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
def megalodon_norm(
    x_ptr,
    lengths_ptr,
    position_ptr,
    mean_ptr,
    varin_ptr,
    new_mean_ptr,
    new_var_ptr,
    mu_ptr,
    var_ptr,
    sums_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    L,
    eps,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    GROUPS: tl.constexpr,
    HF: tl.constexpr,
    S: tl.constexpr,
    PDL: tl.constexpr,
):
    """y (B, L, D) = TimestepNorm(x), zeros where not valid; new statistics (B, G) after each row's last valid step."""
    start(PDL)
    segment = tl.program_id(0)
    segments = tl.num_programs(0)
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    g_ok = g < G
    b = tl.program_id(2).to(tl.int64)
    steps = tl.arange(0, S)
    token = segment * S + steps
    wait(PDL)
    length = tl.load(lengths_ptr + b)
    position = tl.load(position_ptr + b)
    # What the segments before this one sum up to: as many of their sums at a time as a segment has tokens.
    first_before = tl.zeros((GROUPS,), tl.float64)
    second_before = tl.zeros((GROUPS,), tl.float64)
    for earlier in range(0, segment, S):
        other = earlier + steps
        entry = sums_ptr + (b * segments + other)[:, None] * (2 * G) + g[None, :]
        entry_ok = (other < segment)[:, None] & g_ok[None, :]
        first_before += tl.sum(tl.load(entry, mask=entry_ok, other=0.0), 0)
        second_before += tl.sum(tl.load(entry + G, mask=entry_ok, other=0.0), 0)
    place = b * L * G + token[:, None] * G + g[None, :]
    valid = token < length
    place_ok = valid[:, None] & g_ok[None, :]
    mu = tl.load(mu_ptr + place, mask=place_ok, other=0.0).to(tl.float64)
    moment = mu * mu
    if not HF:
        moment += tl.load(var_ptr + place, mask=place_ok, other=0.0).to(tl.float64)
    first = tl.cumsum(mu, 0) + first_before[None, :]
    second = tl.cumsum(moment, 0) + second_before[None, :]

    count = position.to(tl.float64)
    seen = (position + tl.minimum(token + 1, length)).to(tl.float64)[:, None]
    seen = tl.maximum(seen, 1.0)
    mean_in = tl.load(mean_ptr + b * G + g, mask=g_ok, other=0.0).to(tl.float64)[None, :]
    var_in = tl.load(varin_ptr + b * G + g, mask=g_ok, other=1.0).to(tl.float64)[None, :]
    mean = (count * mean_in + first) / seen
    prior = tl.maximum(count, 1.0) if HF else count
    variance = (prior * var_in + count * mean_in * mean_in + second) / seen - mean * mean
    variance = tl.maximum(variance, 1e-6 if HF else 0.0).to(tl.float32)
    mean = mean.to(tl.float32)
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
    y = (x - mean[:, :, None]) * inverse_root(variance, eps)[:, :, None] * weight[None, :, :] + bias[None, :, :]
    y = tl.where(valid[:, None, None], y, 0.0)
    tl.store(y_ptr + b * L * (G * GROUP) + at, y.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def modes(plane_ptr, channel, ok, D: tl.constexpr, N: tl.constexpr, N_P: tl.constexpr):
    """A plane (N, D) at some channels: (N_P, channels)."""
    mode = tl.arange(0, N_P)
    mask = (mode < N)[:, None] & ok[None, :]
    return tl.load(plane_ptr + mode[:, None] * D + channel[None, :], mask=mask, other=0.0)


@triton.jit
def channels_of(block, length, CHANNELS: tl.constexpr):
    """Channels of a program, at addresses whose alignment the compiler cannot know.

    Else it gives a thread four neighbouring channels and a quarter of their modes, and every sum over modes goes
    through other threads: three times slower.
    """
    nothing = (length < 0).to(tl.int32)
    return block * CHANNELS + nothing + tl.arange(0, CHANNELS)


@triton.jit
def four_tokens(rows, ok, step, steps, D: tl.constexpr):
    """x of four steps of each channel as it is stored, zeros if they begin at `steps` or beyond."""
    ok = ok & (step < steps)
    x0 = tl.load(rows + step * D, mask=ok, other=0.0)
    x1 = tl.load(rows + (step + 1) * D, mask=ok, other=0.0)
    x2 = tl.load(rows + (step + 2) * D, mask=ok, other=0.0)
    x3 = tl.load(rows + (step + 3) * D, mask=ok, other=0.0)
    return x0, x1, x2, x3


@triton.jit
def input_weights(planes_ptr, channel, ok, D: tl.constexpr, N: tl.constexpr, N_P: tl.constexpr):
    """p, which the kernels take out of the recurrence: h / p <- q h / p + x. Never 0; 1e-30 is as good as 0."""
    return tl.maximum(modes(planes_ptr, channel, ok, D, N, N_P), 1e-30)


@triton.jit
def advance_two(x0, x1, re, im, q_re, q_im, q2_re, q2_im):
    """Two steps of each channel at once, six operations a mode: h <- q^2 h + q x0 + x1."""
    x0, x1 = x0.to(tl.float32)[None, :], x1.to(tl.float32)[None, :]
    return q2_re * re + (q_re * x0 + (x1 - q2_im * im)), q2_re * im + (q2_im * re + q_im * x0)


@triton.jit
def emit(x, re, im, q_re, q_im, g_re, g_im, omega, y, ok):
    """One step of each channel, h <- q h + x, and y = Re(sum_n gamma_n h_n) + omega x."""
    x = x.to(tl.float32)
    re, im = q_re * re + (x[None, :] - q_im * im), q_re * im + q_im * re
    tl.store(y, tl.sum(g_re * re, 0) - tl.sum(g_im * im, 0) + omega * x, mask=ok)  # two sums: of fused products
    return re, im


@triton.jit
def megalodon_local(
    x_ptr,
    lengths_ptr,
    planes_ptr,
    states_ptr,
    L,
    D: tl.constexpr,
    N: tl.constexpr,
    N_P: tl.constexpr,
    CHANNELS: tl.constexpr,
    S: tl.constexpr,
    PDL: tl.constexpr,
):
    """states (B, segments, 2, N, D): the state after a segment of x (B, L, D) from nothing; not a row's last one."""
    start(PDL)
    segment = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    wait(PDL)
    length = tl.load(lengths_ptr + b)
    channel = channels_of(tl.program_id(0), length, CHANNELS)
    ok = channel < D
    PLANE: tl.constexpr = N * D
    q_re = modes(planes_ptr + PLANE, channel, ok, D, N, N_P)
    q_im = modes(planes_ptr + 2 * PLANE, channel, ok, D, N, N_P)
    q2_re, q2_im = q_re * q_re - q_im * q_im, 2.0 * q_re * q_im
    re = tl.zeros((N_P, CHANNELS), tl.float32)
    im = tl.zeros((N_P, CHANNELS), tl.float32)
    if (segment + 1) * S < length:
        rows = x_ptr + (b * L + segment * S) * D + channel
        a0, a1, a2, a3 = four_tokens(rows, ok, 0, S, D)
        for step in range(0, S, 4):
            b0, b1, b2, b3 = four_tokens(rows, ok, step + 4, S, D)  # on their way while these are added
            re, im = advance_two(a0, a1, re, im, q_re, q_im, q2_re, q2_im)
            re, im = advance_two(a2, a3, re, im, q_re, q_im, q2_re, q2_im)
            a0, a1, a2, a3 = b0, b1, b2, b3
        states = states_ptr + (b * tl.num_programs(1) + segment) * (2 * PLANE)
        mode = tl.arange(0, N_P)
        at = mode[:, None] * D + channel[None, :]
        at_ok = (mode < N)[:, None] & ok[None, :]
        p = input_weights(planes_ptr, channel, ok, D, N, N_P)
        tl.store(states + at, p * re, mask=at_ok)
        tl.store(states + PLANE + at, p * im, mask=at_ok)


@triton.jit
def addition(entry, segment, full, ok, PLANE: tl.constexpr):
    """What a segment adds to the state; nothing if no other follows it."""
    place = entry + tl.cast(segment, tl.int64) * (2 * PLANE)
    ok = ok & (segment < full)
    return tl.load(place, mask=ok, other=0.0), tl.load(place + PLANE, mask=ok, other=0.0)


@triton.jit
def leap(entry, segment, count, ok, re, im, leap_re, leap_im, add_re, add_im, PLANE: tl.constexpr):
    """Store the state at the start of a segment if there is one; the state at its end."""
    place = entry + tl.cast(segment, tl.int64) * (2 * PLANE)
    tl.store(place, re, mask=ok & (segment < count))
    tl.store(place + PLANE, im, mask=ok & (segment < count))
    return leap_re * re - leap_im * im + add_re, leap_re * im + leap_im * re + add_im


@triton.jit
def megalodon_carry(
    states_ptr,
    incoming_ptr,
    lengths_ptr,
    planes_ptr,
    segments,
    D: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    S: tl.constexpr,
    DOUBLINGS: tl.constexpr,
    PDL: tl.constexpr,
):
    """In place: what each segment adds (B, segments, 2, N, D) -> the state at the start of each, by q^S."""
    start(PDL)
    PLANE: tl.constexpr = N * D
    b = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = at < PLANE
    leap_re = tl.load(planes_ptr + 5 * PLANE + at, mask=ok, other=0.0)
    leap_im = tl.load(planes_ptr + 6 * PLANE + at, mask=ok, other=0.0)
    for _ in tl.static_range(DOUBLINGS):
        leap_re, leap_im = leap_re * leap_re - leap_im * leap_im, 2.0 * leap_re * leap_im
    wait(PDL)
    full = (tl.maximum(tl.load(lengths_ptr + b), 1) - 1) // S  # segments that another one follows
    pair = incoming_ptr + b * (2 * PLANE) + (at % D * N + at // D) * 2
    re = tl.load(pair, mask=ok, other=0.0)
    im = tl.load(pair + 1, mask=ok, other=0.0)
    entry = states_ptr + b * segments * (2 * PLANE) + at
    count = tl.minimum(full + 1, segments)
    a0, c0 = addition(entry, 0, full, ok, PLANE)
    a1, c1 = addition(entry, 1, full, ok, PLANE)
    a2, c2 = addition(entry, 2, full, ok, PLANE)
    a3, c3 = addition(entry, 3, full, ok, PLANE)
    for segment in range(0, count, 4):
        b0, d0 = addition(entry, segment + 4, full, ok, PLANE)  # on their way while these four are computed
        b1, d1 = addition(entry, segment + 5, full, ok, PLANE)
        b2, d2 = addition(entry, segment + 6, full, ok, PLANE)
        b3, d3 = addition(entry, segment + 7, full, ok, PLANE)
        re, im = leap(entry, segment, count, ok, re, im, leap_re, leap_im, a0, c0, PLANE)
        re, im = leap(entry, segment + 1, count, ok, re, im, leap_re, leap_im, a1, c1, PLANE)
        re, im = leap(entry, segment + 2, count, ok, re, im, leap_re, leap_im, a2, c2, PLANE)
        re, im = leap(entry, segment + 3, count, ok, re, im, leap_re, leap_im, a3, c3, PLANE)
        a0, a1, a2, a3, c0, c1, c2, c3 = b0, b1, b2, b3, d0, d1, d2, d3


@triton.jit
def megalodon_scan(
    x_ptr,
    lengths_ptr,
    planes_ptr,
    omega_ptr,
    states_ptr,
    y_ptr,
    final_ptr,
    L,
    D: tl.constexpr,
    N: tl.constexpr,
    N_P: tl.constexpr,
    CHANNELS: tl.constexpr,
    S: tl.constexpr,
    PDL: tl.constexpr,
):
    """y (B, L, D) float32 from x and the states at the segments' starts; final (B, D, N, 2) after the last token."""
    start(PDL)
    segment = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    wait(PDL)
    length = tl.load(lengths_ptr + b)
    channel = channels_of(tl.program_id(0), length, CHANNELS)
    ok = channel < D
    PLANE: tl.constexpr = N * D
    p = input_weights(planes_ptr, channel, ok, D, N, N_P)
    q_re = modes(planes_ptr + PLANE, channel, ok, D, N, N_P)
    q_im = modes(planes_ptr + 2 * PLANE, channel, ok, D, N, N_P)
    g_re = p * modes(planes_ptr + 3 * PLANE, channel, ok, D, N, N_P)
    g_im = p * modes(planes_ptr + 4 * PLANE, channel, ok, D, N, N_P)
    omega = tl.load(omega_ptr + channel, mask=ok, other=0.0)
    steps = tl.minimum(length - segment * S, S).to(tl.int32)
    if steps > 0:
        states = states_ptr + (b * tl.num_programs(1) + segment) * (2 * PLANE)
        re = modes(states, channel, ok, D, N, N_P) / p
        im = modes(states + PLANE, channel, ok, D, N, N_P) / p
        rows = x_ptr + (b * L + segment * S) * D + channel
        out = y_ptr + (b * L + segment * S) * D + channel
        whole = steps // 4 * 4
        a0, a1, a2, a3 = four_tokens(rows, ok, 0, whole, D)
        for step in range(0, whole, 4):
            b0, b1, b2, b3 = four_tokens(rows, ok, step + 4, whole, D)
            y = out + step * D
            re, im = emit(a0, re, im, q_re, q_im, g_re, g_im, omega, y, ok)
            re, im = emit(a1, re, im, q_re, q_im, g_re, g_im, omega, y + D, ok)
            re, im = emit(a2, re, im, q_re, q_im, g_re, g_im, omega, y + 2 * D, ok)
            re, im = emit(a3, re, im, q_re, q_im, g_re, g_im, omega, y + 3 * D, ok)
            a0, a1, a2, a3 = b0, b1, b2, b3
        for step in range(whole, steps):
            x = tl.load(rows + step * D, mask=ok, other=0.0)
            re, im = emit(x, re, im, q_re, q_im, g_re, g_im, omega, out + step * D, ok)
        if length <= (segment + 1) * S:
            mode = tl.arange(0, N_P)
            pair = final_ptr + b * (2 * PLANE) + (channel[None, :] * N + mode[:, None]) * 2
            pair_ok = (mode < N)[:, None] & ok[None, :]
            p = input_weights(planes_ptr, channel, ok, D, N, N_P)  # again: kept, it would take registers all along
            tl.store(pair, p * re, mask=pair_ok)
            tl.store(pair + 1, p * im, mask=pair_ok)
