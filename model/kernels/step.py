"""Operators of one decode step (`torch.ops.megalodon.*`) over `decode.py` and `tiles.py`, and the layer of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.library import triton_op

from ..cache import LayerCache
from . import FEW, decode, norms, ring, tiles
from .launch import group_sizes, kernel, power_of_2, programmatic

if TYPE_CHECKING:
    from ..feed_forward import FeedForward
    from ..gated_attention import GatedAttention
    from ..rotary import Rotary

_FEATURE_BYTES = 2048  # of a slot's value that a program of attention takes: 16 a thread, for all slots
_SLOTS = 16  # of a ring that a program of attention reads at a time
_MAX_SPLITS = 128  # of the ring's slots among programs
_FEW_COLUMNS = 2560  # of a weight, up to which two or four warps hold its rows
_WARP_BYTES = 512  # of a row that a warp takes with one load
_FEW_ROWS = 2048  # of a weight: fewer do not make enough tiles
_PROGRAMS = 264  # of attention: two for each multiprocessor of a large GPU


def in_turn(weight: Tensor, columns: int, rows: int, warps: int) -> dict[str, int]:
    """Rows of a weight in one program, and its warps: the given ones if its columns are few.

    A thread holds some 64 of a weight's numbers. More rows spare work that every program repeats, and the LayerNorm of
    `feed_up` is much of it; fewer leave more programs to share the bytes. Every thread has 16 bytes of every row, or
    sums meet again in shared memory, which takes longer than more rows spare.
    """
    if columns > _FEW_COLUMNS:
        return {"ROWS": 4 if columns <= 4096 else 2, "num_warps": 8}
    if weight.dtype == torch.uint8 or weight.shape[1] < wide_enough(weight, warps):
        return {"ROWS": 2, "num_warps": 2}
    return {"ROWS": rows, "num_warps": warps}


def wide_enough(weight: Tensor, warps: int) -> int:
    """Columns of a weight that give each thread of some warps 16 bytes of every row."""
    return warps * _WARP_BYTES // weight.element_size()


def in_tiles(rows: int, x: Tensor, bits: int) -> dict[str, Any]:
    """Tiles of `tiles.py` for a weight with so many rows: enough of them to fill a GPU, small enough for its memory.

    Of few columns, a program takes many small steps that are all on their way at once.
    """
    single = x.dtype == torch.float32
    shape = {"BATCH": 32 if single else 64, "ROWS": 16 if rows < _FEW_ROWS else 32, "COLUMNS": 64, "STAGES": 4}
    if bits == 4:  # two halves of x, and scales for every byte
        shape["STAGES"] = 3
    elif not single:
        shape |= {"STAGES": 6} if x.shape[1] <= _FEW_COLUMNS else {"COLUMNS": 128}
    return {**shape, "IEEE": single, "num_warps": 4}


def in_parts(rows: int, x: Tensor, bits: int) -> dict[str, Any]:
    """Tiles of `megalodon_linear_tiles`, whose warps share the columns of a weight of few rows."""
    shape = in_tiles(rows, x, bits)
    if rows >= _FEW_ROWS or bits == 4:
        return {**shape, "PARTS": 1}
    return {**shape, "BATCH": 16, "ROWS": 16, "COLUMNS": 32 if x.dtype == torch.float32 else 64, "PARTS": 4}


def few(batch: int) -> tuple[int, int]:
    """(1, 0) for a few rows, (0, 1) for more: factors of the grids, so that one of the two forms has nothing to do."""
    many = torch.sym_min(1, (batch - 1) // FEW)
    return 1 - many, many


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
    """TimestepNorm and complex EMA of one token a row; their states change in place.

    -> x_norm (B, D), the EMA's output times `scale` + 1 (B, D), and partial sums of the output's squares (B, parts).
    """
    batch, dim = x.shape
    groups, ndim = norm_mean.shape[1], p.shape[1]
    group = group_sizes(dim, groups, 32)
    parts = -(-groups // group["GROUPS"])
    x_norm, scaled = torch.empty_like(x), torch.empty_like(x)
    squares = x.new_empty(batch, parts, dtype=torch.float32)
    kernel(decode.megalodon_ema_step)[batch, parts](
        *(x, position, norm_mean, norm_var, ema_state, weight, bias, p, q, gamma, omega),
        *(weight if scale is None else scale, x_norm, scaled, squares, eps),
        **group,
        N=ndim,
        N_P=power_of_2(ndim),
        HF=hf_statistics,
        AFFINE=scale is not None,
        PDL=programmatic(x),
        num_warps=4 if group["GROUPS"] * group["GROUP_P"] * power_of_2(ndim) > 512 else 1,  # one needs no barriers
    )
    return x_norm, scaled, squares


@triton_op("megalodon::project", mutates_args={"value"})
def project(
    x_norm: Tensor,
    scaled: Tensor,
    squares: Tensor,
    position: Tensor,
    wz: Tensor,
    sz: Tensor | None,
    bz: Tensor,
    wr: Tensor,
    sr: Tensor | None,
    br: Tensor,
    wh1: Tensor,
    sh1: Tensor | None,
    bh1: Tensor,
    wv: Tensor,
    sv: Tensor | None,
    bv: Tensor,
    value: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """All that is linear in the norms' outputs: z (B, Z) and h1 (B, D) float32, r (B, E); v goes into the ring."""
    batch, dim = x_norm.shape
    z_dim, value_dim, heads, chunk = wz.shape[0], wv.shape[0], value.shape[1], value.shape[2]
    z = x_norm.new_empty(batch, z_dim, dtype=torch.float32)
    h = x_norm.new_empty(batch, dim, dtype=torch.float32)
    r = x_norm.new_empty(batch, value_dim)
    turn, tile = few(batch)
    weights = [x_norm if t is None else t for t in (wz, sz, bz, wr, sr, br, wh1, sh1, bh1, wv, sv, bv)]
    tensors = (x_norm, scaled, squares, position, *weights, z, r, h, value, batch, eps)
    sizes = {"D": dim, "Z": z_dim, "E": value_dim, "H": heads, "C": chunk, "PARTS": squares.shape[1]}
    sizes |= {"PARTS_P": power_of_2(squares.shape[1]), "PDL": programmatic(x_norm), **format_of(wz, sz, dim)}
    rows = (value_dim, value_dim, dim, z_dim)
    shape = in_turn(wz, dim, 4, 2)
    programs = sum(_tiles(n, shape) for n in rows)
    kernel(decode.megalodon_project)[(programs * turn,)](
        *tensors, **sizes, WIDTH=power_of_2(stored(dim, sizes)), **shape
    )
    shape = in_tiles(sum(rows), x_norm, sizes["BITS"])
    programs = sum(_tiles(n, shape) for n in rows)
    kernel(tiles.megalodon_project_tiles)[programs * tile, _batches(batch, shape)](*tensors, **sizes, **shape)
    return z, r, h


@triton_op("megalodon::attend", mutates_args={"key"})
def attend(
    z: Tensor,
    r: Tensor,
    gamma: Tensor,
    beta: Tensor,
    position: Tensor,
    cos: Tensor,
    sin: Tensor,
    key: Tensor,
    value: Tensor,
    eps: float,
) -> Tensor:
    """Attention of one token a row over the ring, whose value slot is written already; its key slot is written here.

    z (B, Z) float32, r (B, E), cos and sin (B, dz/2) -> (attention times r) (B, E).
    """
    batch, heads, chunk, dv = value.shape
    half = key.shape[3] // 2
    dv_block = min(power_of_2(dv), _FEATURE_BYTES // r.element_size())
    dv_blocks = -(-dv // dv_block)
    splits = torch.sym_max(1, torch.sym_min(_MAX_SPLITS, _PROGRAMS // (batch * heads * dv_blocks)))
    entries = batch * heads + _PROGRAMS // dv_blocks  # at least batch heads splits
    partial = z.new_empty(entries, dv)
    statistics = z.new_empty(entries, 2)
    gated = torch.empty_like(r)
    pdl = programmatic(z)
    kernel(ring.megalodon_attend)[dv_blocks * splits, heads, batch](
        *(z, gamma, beta, position, cos, sin, key, value, partial, statistics, splits, eps),
        H=heads,
        C=chunk,
        HALF=half,
        HALF_P=power_of_2(half),
        DV=dv,
        DV_BLOCK=dv_block,
        SLOTS=_SLOTS,
        PDL=pdl,
        num_warps=max(dv_block * r.element_size() // 512, 1),
    )
    block = min(power_of_2(dv), 32)
    kernel(ring.megalodon_combine)[-(-dv // block), heads, batch](
        *(partial, statistics, r, gated, splits),
        H=heads,
        DV=dv,
        DV_BLOCK=block,
        MAX_SPLITS=_MAX_SPLITS,
        PDL=pdl,
        num_warps=4,
    )
    return gated


@triton_op("megalodon::linear", mutates_args={})
def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    alpha: Tensor | None,
    first: Tensor | None,
    second: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """first + second + alpha * (x W^T + bias) in `dtype`, what there is of it: x (B, K), weight (rows, K)."""
    batch, columns = x.shape
    rows = weight.shape[0]
    y = x.new_empty(batch, rows, dtype=dtype)
    turn, tile = few(batch)
    tensors = (x, weight, *(x if t is None else t for t in (scale, bias, alpha, first, second)), y, batch)
    given = {"BIAS": bias, "ALPHA": alpha, "FIRST": first, "SECOND": second}
    sizes = {"ROWS_OF": rows, "K": columns, **{name: t is not None for name, t in given.items()}}
    sizes |= {"PDL": programmatic(x), **format_of(weight, scale, columns)}
    shape = in_turn(weight, columns, 4, 4)
    head = 1 << (stored(columns, sizes).bit_length() - 1)
    rest = stored(columns, sizes) - head
    least = wide_enough(weight, shape["num_warps"]) if shape["ROWS"] > 2 else 1  # see `in_turn`
    tail = {"HEAD": head, "TAIL_P": max(power_of_2(rest), least) if rest else 0}
    kernel(decode.megalodon_linear)[(_tiles(rows, shape) * turn,)](*tensors, **sizes, **tail, **shape)
    shape = in_parts(rows, x, sizes["BITS"])
    kernel(tiles.megalodon_linear_tiles)[_tiles(rows, shape) * tile, _batches(batch, shape)](*tensors, **sizes, **shape)
    return y


@triton_op("megalodon::feed_up", mutates_args={})
def feed_up(
    h: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    w1: Tensor,
    s1: Tensor | None,
    b1: Tensor | None,
    w3: Tensor | None,
    s3: Tensor | None,
    b3: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """The feed-forward's hidden layer (B, F) in `dtype` from h (B, D) float32: LayerNorm, fc1 (fc3), silu."""
    batch, dim = h.shape
    rows = w1.shape[0]
    hidden, normed = h.new_empty(batch, rows, dtype=dtype), h.new_empty(batch, dim, dtype=dtype)
    affine, pdl = norm_weight is not None and norm_bias is not None, programmatic(h)
    turn, tile = few(batch)
    norm = [h if t is None else t for t in (norm_weight, norm_bias)]
    weights = [h if t is None else t for t in (w1, s1, b1, w3, s3, b3)]
    up = {"F": rows, "D": dim, "BIAS": b1 is not None, "SWIGLU": w3 is not None, "PDL": pdl, **format_of(w1, s1, dim)}
    apart = 1 if up["BITS"] == 4 else tile  # whether a kernel of its own normalises
    kernel(norms.megalodon_layer_norm)[(batch * apart,)](
        *(h, h, h, *norm, normed, eps), D=dim, D_P=power_of_2(dim), AFFINE=affine, SUM=False, PDL=pdl, num_warps=4
    )
    shape = in_turn(w1, dim, 8 if dim <= 1024 else 4, 4)
    kernel(decode.megalodon_feed_up)[(_tiles(rows, shape) * turn,)](
        *(normed if up["BITS"] == 4 else h, *norm, *weights, hidden, batch, eps),
        **up,
        WIDTH=power_of_2(stored(dim, up)),
        AFFINE=affine,
        **shape,
    )
    shape = in_tiles(rows, normed, up["BITS"])
    kernel(tiles.megalodon_feed_up_tiles)[_tiles(rows, shape) * tile, _batches(batch, shape)](
        *(normed, *weights, hidden, batch), **up, **shape
    )
    return hidden


def format_of(weight: Tensor, scale: Tensor | None, columns: int) -> dict[str, Any]:
    """How a weight is stored, as the kernels are told: see `weights.py`."""
    if scale is None:
        return {"BITS": 0, "GROUP": 0}
    return {"BITS": 8, "GROUP": 0} if weight.dtype == torch.int8 else {"BITS": 4, "GROUP": columns // scale.shape[1]}


def stored(columns: int, sizes: dict[str, Any]) -> int:
    """Columns of a weight as it is stored: those of int4 are bytes."""
    return columns // 2 if sizes["BITS"] == 4 else columns


def _tiles(rows: int, shape: dict[str, Any]) -> int:
    return -(-rows // shape["ROWS"])


def _batches(batch: int, shape: dict[str, Any]) -> int:
    return (batch + shape["BATCH"] - 1) // shape["BATCH"]


def layer_step(
    attn: GatedAttention, ffn: FeedForward, x: Tensor, position: Tensor, rotary: Rotary, cache: LayerCache
) -> Tensor:
    """One token a row through a layer, x (B, D) -> (B, D); the layer's cache changes in place."""
    c = attn.cema.constants()
    norm = attn.timenorm
    x_norm, scaled, squares = ema_step(
        *(x, position, cache.norm_mean, cache.norm_var, cache.ema_state, norm.weight, norm.bias),
        *(c["p"], c["q"], c["gamma"], c["omega"], attn.rmsnorm.weight, norm.eps, norm.statistics == "megalodon-hf"),
    )
    z, r, h1 = project(
        *(x_norm, scaled, squares, position, *parts(attn.wz), *parts(attn.wr), *parts(attn.wh1), *parts(attn.wv)),
        *(cache.value, attn.rmsnorm.eps),
    )
    cos, sin = rotary
    gated = attend(z, r, attn.gamma, attn.beta, position, cos, sin, cache.key, cache.value, attn.znorm.eps)
    h = linear(gated, *parts(attn.wh2), None, h1, x, torch.float32)
    hidden = feed_up(
        *(h, ffn.norm.weight, ffn.norm.bias, *parts(ffn.fc1), *parts(ffn.fc3), ffn.norm.eps, x.dtype),
    )
    return linear(hidden, *parts(ffn.fc2), ffn.alpha, x, None, x.dtype)


def parts(layer: nn.Module | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Weight, scale and bias of a linear layer, quantised or not; what it has not is None."""
    weight, scale, bias = (getattr(layer, name, None) for name in ("weight", "scale", "bias"))
    return weight, scale, bias
