"""The feed-forward's first half of a decode step: LayerNorm, fc1 and silu, times fc3 with SwiGLU.

    hidden = silu(fc1(LayerNorm(h)))            with swiglu: silu(fc1(n)) * fc3(n), n = LayerNorm(h)

On the GEMV path every program normalises its row itself, in registers. int4 weights and the GEMM path read a row that
`layer_norm.py: megalodon_layer_norm` has normalised before.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from ..elementwise import silu
from ..launch import grid_dependency_wait, launch, launch_dependents, next_power_of_2, supports_pdl
from ..layer_norm import layer_norm, load_scale_and_shift, megalodon_layer_norm
from .gemm import batch_tiles, feature_tiles, gemm_launches, gemm_product, use_gemv
from .gemv import gemv_reference, gemv_registers, gemv_tile, gemv_tile_sizes, load_weight_tile
from .weights import load_output_features, storage_format, stored_columns


def up_projection_reference(
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
    """The hidden layer (B, F) in `dtype` from h (B, D) float32; the normalised row is rounded to `dtype` as well."""
    scale = None if norm_weight is None else norm_weight.float() + 1
    shift = None if norm_bias is None else norm_bias.float()
    n = F.layer_norm(h, h.shape[-1:], scale, shift, eps).to(dtype)
    hidden = F.silu(gemv_reference(n, w1, s1) + (0 if b1 is None else b1.float()))
    if w3 is not None:
        hidden = hidden * (gemv_reference(n, w3, s3) + (0 if b3 is None else b3.float()))
    return hidden.to(dtype)


@triton_op("megalodon::up_projection", mutates_args={})
def up_projection(
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
    """The feed-forward's hidden layer (B, F) in `dtype` from h (B, D) float32: LayerNorm, fc1, silu, times fc3.

    norm_weight and norm_bias (D) or None; fc1 and fc3 each as weight (F, D) as stored, scales or None, bias (F) or
    None; w3 is None without SwiGLU.
    """
    batch, dim = h.shape
    features = w1.shape[0]
    hidden, normed = h.new_empty(batch, features, dtype=dtype), h.new_empty(batch, dim, dtype=dtype)
    affine, pdl = norm_weight is not None and norm_bias is not None, supports_pdl(h)
    gemv = use_gemv(batch, normed, w1, s1)
    norm = [h if t is None else t for t in (norm_weight, norm_bias)]
    weights = [h if t is None else t for t in (w1, s1, b1, w3, s3, b3)]
    sizes = {"F": features, "D": dim, "BIAS": b1 is not None, "SWIGLU": w3 is not None, "PDL": pdl}
    sizes |= storage_format(w1, s1, dim)
    normalise_first = 1 if sizes["BITS"] == 4 else 1 - gemv
    launch(megalodon_layer_norm, (batch * normalise_first,))(
        *(h, h, h, *norm, normed, eps), D=dim, D_P=next_power_of_2(dim), AFFINE=affine, SUM=False, PDL=pdl, num_warps=4
    )
    shape = gemv_tile_sizes(w1, dim, 8 if dim <= 1024 else 4, 4)
    launch(megalodon_up_projection_gemv, (feature_tiles(features, shape) * gemv,))(
        *(normed if sizes["BITS"] == 4 else h, *norm, *weights, hidden, batch, eps),
        **sizes,
        WIDTH=next_power_of_2(stored_columns(dim, sizes)),
        AFFINE=affine,
        **shape,
    )
    for use, shape in gemm_launches(batch, features, normed, w1, s1):
        grid = (feature_tiles(features, shape) * use, batch_tiles(batch, shape))
        launch(megalodon_up_projection_gemm, grid)(*(normed, *weights, hidden, batch), **sizes, **shape)
    return hidden


@triton.jit
def megalodon_up_projection_gemv(
    h_ptr, norm_weight_ptr, norm_bias_ptr, w1_ptr, s1_ptr, b1_ptr, w3_ptr, s3_ptr, b3_ptr, hidden_ptr,
    B, eps,
    F: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, FEATURES: tl.constexpr,
    AFFINE: tl.constexpr, BIAS: tl.constexpr, SWIGLU: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """hidden = silu(fc1(LayerNorm(h))), times fc3(LayerNorm(h)) with SWIGLU; int4 takes h as already normalised.

    In: h (B, D), float32 or, for int4, hidden's dtype; norm weight, norm bias (D); fc1 and fc3 as weight (F, D),
    scales, bias (F). Out: hidden (B, F). Grid: (ceil(F / FEATURES),), FEATURES hidden features a program for all B
    rows. The program's tiles of both weights and the norm's scale and shift stay in registers over the loop of rows.
    """
    launch_dependents(PDL)
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    dtype = hidden_ptr.dtype.element_ty
    w1 = load_weight_tile(w1_ptr, s1_ptr, feature, 0, F, D, WIDTH, BITS, GROUP)
    b1 = tl.zeros((FEATURES,), tl.float32)
    b3 = tl.zeros((FEATURES,), tl.float32)
    if BIAS:
        b1 += load_output_features(b1_ptr, feature, F)
    if SWIGLU:
        w3 = load_weight_tile(w3_ptr, s3_ptr, feature, 0, F, D, WIDTH, BITS, GROUP)
        if BIAS:
            b3 += load_output_features(b3_ptr, feature, F)
    if BITS != 4:
        k = tl.arange(0, WIDTH)
        scale, shift = load_scale_and_shift(norm_weight_ptr, norm_bias_ptr, k, D, AFFINE)
    grid_dependency_wait(PDL)
    for b in range(B):
        if BITS == 4:
            y = gemv_tile(w1, h_ptr + b * D, 0, D, WIDTH, BITS, GROUP)
            if SWIGLU:
                gate = gemv_tile(w3, h_ptr + b * D, 0, D, WIDTH, BITS, GROUP)
        else:
            x = tl.load(h_ptr + b * D + k, mask=k < D, other=0.0)
            x = layer_norm(x, k, eps, scale, shift, D).to(dtype).to(tl.float32)
            y = gemv_registers(w1, x)
            if SWIGLU:
                gate = gemv_registers(w3, x)
        y = silu(y + b1)
        if SWIGLU:
            y *= gate + b3
        tl.store(hidden_ptr + b * F + feature, y.to(dtype), mask=feature < F)


@triton.jit
def megalodon_up_projection_gemm(
    x_ptr, w1_ptr, s1_ptr, b1_ptr, w3_ptr, s3_ptr, b3_ptr, hidden_ptr,
    B,
    F: tl.constexpr, D: tl.constexpr, BIAS: tl.constexpr, SWIGLU: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, K_TILE: tl.constexpr, SPLIT_K: tl.constexpr, STAGES: tl.constexpr,
    FRAGMENTS: tl.constexpr, IEEE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """hidden = silu(fc1(x)), times fc3(x) with SWIGLU, on the tensor cores; x is already normalised.

    In: x (B, D); fc1 and fc3 as weight (F, D), scales, bias (F). Out: hidden (B, F).
    Grid: (ceil(F / FEATURES), ceil(B / ROWS)). Both tiles of sums stay in registers.
    """
    launch_dependents(PDL)
    first_feature, first_row = tl.program_id(0) * FEATURES, tl.program_id(1) * ROWS
    y = gemm_product(
        x_ptr, w1_ptr, s1_ptr, first_feature, first_row, B,
        F, D, BITS, GROUP, ROWS, FEATURES, K_TILE, SPLIT_K, STAGES, FRAGMENTS, IEEE, PDL,
    )  # fmt: skip
    feature, b = first_feature + tl.arange(0, FEATURES), first_row + tl.arange(0, ROWS)
    if BIAS:
        y += load_output_features(b1_ptr, feature, F)[:, None]
    y = silu(y)
    if SWIGLU:
        gate = gemm_product(
            x_ptr, w3_ptr, s3_ptr, first_feature, first_row, B,
            F, D, BITS, GROUP, ROWS, FEATURES, K_TILE, SPLIT_K, STAGES, FRAGMENTS, IEEE, PDL,
        )  # fmt: skip
        if BIAS:
            gate += load_output_features(b3_ptr, feature, F)[:, None]
        y *= gate
    at = (b * F)[None, :] + feature[:, None]
    tl.store(hidden_ptr + at, y.to(hidden_ptr.dtype.element_ty), mask=(b < B)[None, :] & (feature < F)[:, None])
