"""The start of a decode step: rows of the embedding, and of the rotary table. One kernel, so that PDL can link it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from ..launch import grid_dependency_wait, launch, launch_dependents, next_power_of_2, supports_pdl

_FEATURES_PER_WARP = 256  # 8 a thread: in bfloat16 one load
_MAX_WARPS = 16


def embed_tokens_reference(
    token_ids: Tensor, position: Tensor, table: Tensor, cos: Tensor, sin: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """table[token_ids] * scale, and cos and sin of slot position % C; NaN for a token that the table does not have."""
    known = (token_ids >= 0) & (token_ids < table.shape[0])
    x = table[token_ids.where(known, 0)] * scale
    slot = position % cos.shape[0]
    return x.masked_fill(~known[:, None], float("nan")), cos[slot], sin[slot]


@triton_op("megalodon::embed_tokens", mutates_args={})
def embed_tokens(
    token_ids: Tensor, position: Tensor, table: Tensor, cos: Tensor, sin: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the embedding times `scale`, and rows position % C of cos and sin.

    token_ids, position (B) int64; table (V, D); cos, sin (C, dz/2) -> x (B, D), cos and sin (B, dz/2). A token that
    the table does not have gives NaN.
    """
    (batch,), (vocabulary, dim), (chunk, half) = token_ids.shape, table.shape, cos.shape
    x = table.new_empty(batch, dim)
    row_cos, row_sin = cos.new_empty(batch, half), sin.new_empty(batch, half)
    launch(megalodon_embed_tokens, (batch,))(
        *(token_ids, position, table, cos, sin, x, row_cos, row_sin, token_ids.stride(0), scale),
        V=vocabulary,
        D=dim,
        D_P=next_power_of_2(dim),
        C=chunk,
        HALF=half,
        HALF_P=next_power_of_2(half),
        PDL=supports_pdl(table),
        num_warps=row_warps(next_power_of_2(dim)),
    )
    return x, row_cos, row_sin


def row_warps(features: int) -> int:
    """Warps of a program that takes a whole row of so many features."""
    return min(max(features // _FEATURES_PER_WARP, 1), _MAX_WARPS)


@triton.jit
def megalodon_embed_tokens(
    token_ptr, position_ptr, table_ptr, cos_ptr, sin_ptr, x_ptr, row_cos_ptr, row_sin_ptr,
    token_stride, scale,
    V: tl.constexpr, D: tl.constexpr, D_P: tl.constexpr,
    C: tl.constexpr, HALF: tl.constexpr, HALF_P: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """x = table[token] * scale, rounded to the table's dtype; cos and sin of slot position % C.

    In: token (B) with stride token_stride, position (B) int64; table (V, D); cos, sin (C, HALF). Out: x (B, D);
    row_cos, row_sin (B, HALF). Grid: (B,), one row of the batch a program.
    """
    launch_dependents(PDL)
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, D_P)
    half = tl.arange(0, HALF_P)
    grid_dependency_wait(PDL)
    token = tl.load(token_ptr + b * token_stride).to(tl.int64)
    slot = tl.load(position_ptr + b) % C
    known = (token >= 0) & (token < V)
    x = tl.load(table_ptr + token * D + k, mask=known & (k < D), other=float("nan")).to(tl.float32)
    cos = tl.load(cos_ptr + slot * HALF + half, mask=half < HALF)
    sin = tl.load(sin_ptr + slot * HALF + half, mask=half < HALF)
    tl.store(x_ptr + b * D + k, (x * tl.cast(scale, tl.float32)).to(x_ptr.dtype.element_ty), mask=k < D)
    tl.store(row_cos_ptr + b * HALF + half, cos, mask=half < HALF)
    tl.store(row_sin_ptr + b * HALF + half, sin, mask=half < HALF)
