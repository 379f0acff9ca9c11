"""Operators of a prefill (`torch.ops.megalodon.*`) over `scan.py`, `chunks.py` and `norms.py`, and their layer.

The matrix products stay torch's: a GPU's own library is at its best there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import triton_op

from ..cache import LayerCache
from ..plan import SEGMENT
from . import chunks, norms, scan
from .launch import group_sizes, kernel, power_of_2, programmatic

if TYPE_CHECKING:
    from ..feed_forward import FeedForward
    from ..gated_attention import GatedAttention
    from ..norm import TimestepNorm
    from ..rotary import Rotary

_ROWS, _TILES = 16, 8  # of queries, a part of a tile, and of tiles of keys: the weights that a program normalises
_CHANNELS = 32  # of the scan in one program: one warp, a thread a channel
_WIDE = 2048  # channels from which on longer segments, and more groups in a program, still fill a GPU


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
    """TimestepNorm of x (B, L, D) from statistics (B, G): x_norm, zeros where not valid, and the new statistics."""
    batch, length, dim = x.shape
    groups = mean.shape[1]
    group = group_sizes(dim, groups, 64 if dim < _WIDE else 128)
    segments = (length + SEGMENT - 1) // SEGMENT
    mu = x.new_empty(batch, length, groups, dtype=torch.float32)
    within = torch.empty_like(mu)
    sums = x.new_empty(batch, segments, 2, groups, dtype=torch.float64)
    y, new_mean, new_var = torch.empty_like(x), mean.clone(), var.clone()
    grid = (segments, -(-groups // group["GROUPS"]), batch)
    sizes: dict[str, Any] = {**group, "HF": hf_statistics, "S": SEGMENT, "PDL": programmatic(x), "num_warps": 4}
    kernel(scan.megalodon_moments)[grid](x, lengths, mu, within, sums, length, **sizes)
    kernel(scan.megalodon_norm)[grid](
        *(x, lengths, position, mean, var, new_mean, new_var, mu, within, sums, weight, bias, y, length, eps), **sizes
    )
    return y, new_mean, new_var


@triton_op("megalodon::ema_scan", mutates_args={"state"})
def ema_scan(
    x: Tensor,
    lengths: Tensor,
    state: Tensor,
    planes: Tensor,
    omega: Tensor,
    scale: Tensor | None,
    eps: float,
) -> Tensor:
    """Complex EMA of x (B, L, D), whose state (B, D, N, 2) moves on in place, then RMSNorm: m (B, L, D).

    `planes` (7, N, D) are p, q, gamma and q to the power SEGMENT (see `ComplexEMA`). Zeros where not valid. A scan of
    segments twice as long takes half of the memory for states, and half of the time to carry them on.
    """
    batch, length, dim = x.shape
    ndim = planes.shape[1]
    doublings = 0 if dim < _WIDE else 1
    segment = SEGMENT << doublings
    segments = (length + segment - 1) // segment
    states = x.new_empty(batch, segments, 2, ndim, dim, dtype=torch.float32)
    y = x.new_empty(batch, length, dim, dtype=torch.float32)
    m = torch.empty_like(x)
    pdl = programmatic(x)
    grid = (-(-dim // _CHANNELS), segments, batch)
    sizes: dict[str, Any] = {"D": dim, "N": ndim, "N_P": power_of_2(ndim), "CHANNELS": _CHANNELS}
    sizes |= {"S": segment, "PDL": pdl, "num_warps": 1}
    kernel(scan.megalodon_local)[grid](x, lengths, planes, states, length, **sizes)
    kernel(scan.megalodon_carry)[-(-dim * ndim // 128), batch](
        *(states, state, lengths, planes, segments),
        **{"D": dim, "N": ndim, "BLOCK": 128, "S": segment, "DOUBLINGS": doublings, "PDL": pdl, "num_warps": 4},
    )
    kernel(scan.megalodon_scan)[grid](x, lengths, planes, omega, states, y, state, length, **sizes)
    kernel(norms.megalodon_rms)[length, batch](
        *(y, lengths, y if scale is None else scale, m, length, eps),
        D=dim,
        D_P=power_of_2(dim),
        AFFINE=scale is not None,
        PDL=pdl,
        num_warps=4,
    )
    return m


@triton_op("megalodon::attend_chunks", mutates_args={"key", "value"})
def attend_chunks(
    z: Tensor,
    v: Tensor,
    r: Tensor,
    gamma: Tensor,
    beta: Tensor,
    lengths: Tensor,
    position: Tensor,
    cos: Tensor,
    sin: Tensor,
    key: Tensor,
    value: Tensor,
    eps: float,
) -> Tensor:
    """Attention of new tokens over the ring and each other, times silu(r); the rings take the new keys and values.

    z (B, L, Z), v and r (B, L, E), cos and sin (B, L, dz/2) -> (B, L, E).
    """
    batch, length, _ = z.shape
    heads, chunk, dz, dv = key.shape[1], key.shape[2], key.shape[3], value.shape[3]
    q = z.new_empty(batch, heads, length, dz)
    k = torch.empty_like(q)
    single = z.dtype == torch.float32
    pdl, queries, keys = programmatic(z), 64 if single else 128, 64
    tiles = -(-chunk // keys) + queries // keys  # a tile of queries may reach into the next chunk
    per_head = {"H": heads, "PDL": pdl}
    kernel(chunks.megalodon_rotate)[length, heads, batch](
        *(z, gamma, beta, cos, sin, q, k, length, eps),
        HALF=dz // 2,
        HALF_P=power_of_2(dz // 2),
        num_warps=1,
        **per_head,
    )
    weights = z.new_empty(batch, heads, length, tiles * keys)
    peaks = z.new_empty(batch, heads, tiles, length, dtype=torch.float32)
    totals = torch.empty_like(peaks)
    query_tiles = (length + queries - 1) // queries
    shape = {**per_head, "C": chunk, "QUERIES": queries, "KEYS": keys, "TILES": tiles}
    kernel(chunks.megalodon_scores)[tiles, query_tiles, batch * heads](
        *(q, k, key, position, weights, peaks, totals, length),
        DZ=dz,
        DZ_P=max(power_of_2(dz), 16),
        IEEE=single,
        num_warps=4,
        **shape,
    )
    kernel(chunks.megalodon_softmax)[-(-tiles // _TILES), (length + _ROWS - 1) // _ROWS, batch * heads](
        *(weights, peaks, totals, position, length),
        ROWS=_ROWS,
        GROUP=_TILES,
        TILES_P=power_of_2(tiles),
        num_warps=4,
        **shape,
    )
    gated = torch.empty_like(r)
    # Large parts read the weights less often, small ones leave nobody idle.
    dv_block = max(16, min(power_of_2(dv), 128 if single or heads < 4 else 256))
    kernel(chunks.megalodon_weigh)[-(-dv // dv_block), query_tiles, batch * heads](
        *(weights, v, value, position, r, gated, length, query_tiles),
        DV=dv,
        DV_BLOCK=dv_block,
        STAGES=3 if single else 4,
        IEEE=single,
        num_warps=8,
        **shape,
    )
    block = min(power_of_2(dv), 2048)
    rows = {"DZ": dz, "DZ_P": power_of_2(dz), "DV": dv, "BLOCK": block, "num_warps": max(block // 512, 1)}
    kernel(chunks.megalodon_store)[length, heads, batch](
        *(k, v, key, value, lengths, position, length), C=chunk, **rows, **per_head
    )
    return gated


@triton_op("megalodon::sum_norm", mutates_args={})
def sum_norm(
    first: Tensor, second: Tensor, third: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """LayerNorm(first + second + third) of (B, L, D), scale weight + 1, in the dtype of `first`."""
    batch, length, dim = first.shape
    y = torch.empty_like(first)
    kernel(norms.megalodon_layer_norm)[(batch * length,)](
        *(first, second, third, *(first if t is None else t for t in (weight, bias)), y, eps),
        D=dim,
        D_P=power_of_2(dim),
        SUM=True,
        AFFINE=weight is not None,
        PDL=programmatic(first),
        num_warps=4,
    )
    return y


def normed(norm: TimestepNorm, x: Tensor, lengths: Tensor, position: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """TimestepNorm of new tokens; its statistics (B, G) change in place."""
    y, new_mean, new_var = timestep_norm(
        *(x, lengths, position, mean, var, norm.weight, norm.bias, norm.eps, norm.statistics == "megalodon-hf")
    )
    mean.copy_(new_mean)
    var.copy_(new_var)
    return y


def layer_prefill(
    attn: GatedAttention,
    ffn: FeedForward,
    x: Tensor,
    lengths: Tensor,
    position: Tensor,
    rotary: Rotary,
    cache: LayerCache,
) -> Tensor:
    """New tokens of each row through a layer, x (B, L, D) -> (B, L, D); the layer's cache changes in place."""
    c = attn.cema.constants()
    x_norm = normed(attn.timenorm, x, lengths, position, cache.norm_mean, cache.norm_var)
    m = ema_scan(
        *(x_norm, lengths, cache.ema_state, c["scan_coefficients"], c["omega"], attn.rmsnorm.weight, attn.rmsnorm.eps)
    )
    v = F.silu(attn.wv(x_norm))
    gated = attend_chunks(
        *(attn.wz(m), v, attn.wr(m), attn.gamma, attn.beta, lengths, position, *rotary),
        *(cache.key, cache.value, attn.znorm.eps),
    )
    n = sum_norm(attn.wh1(m), attn.wh2(gated), x, ffn.norm.weight, ffn.norm.bias, ffn.norm.eps)
    hidden = F.silu(ffn.fc1(n))
    if ffn.fc3 is not None:
        hidden = hidden * ffn.fc3(n)
    out = ffn.fc2(hidden)
    return x + (out if ffn.alpha is None else ffn.alpha * out)
