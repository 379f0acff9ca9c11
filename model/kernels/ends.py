"""The ends of a decode step around its layers: one kernel for what the first takes, one for what the head takes.

With them the kernels of a step are one chain, in which every one may begin while the one before it runs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, empty_like
from torch.library import triton_op

from .launch import kernel, power_of_2, programmatic, start, wait
from .norms import timestep_norm

_CHANNELS = 256  # of a row that one warp takes: 8 a thread, in bfloat16 one load
_MAX_WARPS = 16


@triton_op("megalodon::begin", mutates_args={})
def begin(
    token_ids: Tensor, position: Tensor, table: Tensor, cos: Tensor, sin: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows token_ids (B) of the embedding `table` (V, D) times `scale`, and rows position % C of cos, sin (C, dz/2).

    A token that the table does not have gives NaN.
    """
    (batch,), (vocabulary, dim), (chunk, half) = token_ids.shape, table.shape, cos.shape
    x = table.new_empty(batch, dim)
    row_cos, row_sin = cos.new_empty(batch, half), sin.new_empty(batch, half)
    kernel(megalodon_begin)[(batch,)](
        *(token_ids, position, table, cos, sin, x, row_cos, row_sin, token_ids.stride(0), scale),
        V=vocabulary,
        D=dim,
        D_P=power_of_2(dim),
        C=chunk,
        HALF=half,
        HALF_P=power_of_2(half),
        PDL=programmatic(table),
        num_warps=_warps(power_of_2(dim)),
    )
    return x, row_cos, row_sin


@triton_op("megalodon::end", mutates_args={"position", "mean", "var"})
def end(
    x: Tensor,
    position: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    hf_statistics: bool,
) -> Tensor:
    """TimestepNorm of one token a row, x (B, D) -> (B, D); its statistics (B, G) and the positions (B) move on."""
    batch, dim = x.shape
    groups = mean.shape[1]
    group = dim // groups
    padded = {"G_P": power_of_2(groups), "GROUP_P": power_of_2(group)}
    y = empty_like(x)
    kernel(megalodon_end)[(batch,)](
        *(x, position, mean, var, weight, bias, y, eps),
        G=groups,
        GROUP=group,
        **padded,
        HF=hf_statistics,
        PDL=programmatic(x),
        num_warps=_warps(padded["G_P"] * padded["GROUP_P"]),
    )
    return y


def _warps(channels: int) -> int:
    return min(max(channels // _CHANNELS, 1), _MAX_WARPS)


@triton.jit
def megalodon_begin(
    token_ptr,
    position_ptr,
    table_ptr,
    cos_ptr,
    sin_ptr,
    x_ptr,
    row_cos_ptr,
    row_sin_ptr,
    token_stride,
    scale,
    V: tl.constexpr,
    D: tl.constexpr,
    D_P: tl.constexpr,
    C: tl.constexpr,
    HALF: tl.constexpr,
    HALF_P: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row. The product is rounded to the table's dtype, as the plain form's is."""
    start(PDL)
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, D_P)
    half = tl.arange(0, HALF_P)
    wait(PDL)
    token = tl.load(token_ptr + b * token_stride).to(tl.int64)
    slot = tl.load(position_ptr + b) % C
    known = (token >= 0) & (token < V)
    x = tl.load(table_ptr + token * D + k, mask=known & (k < D), other=float("nan")).to(tl.float32)
    cos = tl.load(cos_ptr + slot * HALF + half, mask=half < HALF)
    sin = tl.load(sin_ptr + slot * HALF + half, mask=half < HALF)
    tl.store(x_ptr + b * D + k, (x * tl.cast(scale, tl.float32)).to(x_ptr.dtype.element_ty), mask=k < D)
    tl.store(row_cos_ptr + b * HALF + half, cos, mask=half < HALF)
    tl.store(row_sin_ptr + b * HALF + half, sin, mask=half < HALF)


@triton.jit
def megalodon_end(
    x_ptr,
    position_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    eps,
    G: tl.constexpr,
    G_P: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_P: tl.constexpr,
    HF: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row, whose position nobody else reads any more when it is written."""
    start(PDL)
    b = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, G_P)
    inside = tl.arange(0, GROUP_P)
    ok = (group < G)[:, None] & (inside < GROUP)[None, :]
    channel = group[:, None] * GROUP + inside[None, :]
    weight = tl.load(weight_ptr + channel, mask=ok, other=0.0).to(tl.float32) + 1.0
    bias = tl.load(bias_ptr + channel, mask=ok, other=0.0).to(tl.float32)
    wait(PDL)
    y, position = timestep_norm(
        x_ptr, position_ptr, mean_ptr, var_ptr, b, group, channel, ok, weight, bias, eps, G, GROUP, HF
    )
    tl.store(y_ptr + b * (G * GROUP) + channel, y.to(y_ptr.dtype.element_ty), mask=ok)
    tl.store(position_ptr + b, position + 1)
