"""A linear layer with what is added to it, on the GEMV or the GEMM path: wh2, fc2 and the head of a decode step.

    y = first + second + alpha * (x W^T + bias)

The kernels are `gemv.py: megalodon_linear_gemv` and `gemm.py: megalodon_linear_gemm`, launched for several ranges of
the batch: all grids but one are empty.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import triton_op

from ..launch import launch, next_power_of_2, supports_pdl
from .gemm import batch_tiles, feature_tiles, gemm_launches, megalodon_linear_gemm, use_gemv
from .gemv import gemv_reference, gemv_tile_sizes, megalodon_linear_gemv, min_columns
from .weights import storage_format, stored_columns


def linear_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    alpha: Tensor | None,
    first: Tensor | None,
    second: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """first + second + alpha * (x W^T + bias), without the terms that are None; all in float32, rounded once."""
    y = gemv_reference(x, weight, scale)
    y = y if bias is None else y + bias.float()
    y = y if alpha is None else y * alpha.float()
    for term in (first, second):
        y = y if term is None else y + term.float()
    return y.to(dtype)


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
    """first + second + alpha * (x W^T + bias), without the terms that are None; sums in float32.

    x (B, K); weight (OUT, K) as stored, with its scales (`weights.py`); bias, alpha (OUT); first, second (B, OUT)
    -> (B, OUT) in `dtype`.
    """
    batch, columns = x.shape
    features = weight.shape[0]
    y = x.new_empty(batch, features, dtype=dtype)
    tensors = (x, weight, *(x if t is None else t for t in (scale, bias, alpha, first, second)), y, batch)
    given = {"BIAS": bias, "ALPHA": alpha, "FIRST": first, "SECOND": second}
    sizes = {"OUT": features, "K": columns, **{name: t is not None for name, t in given.items()}}
    sizes |= {"PDL": supports_pdl(x), **storage_format(weight, scale, columns)}
    shape = gemv_tile_sizes(weight, columns, 4, 4)
    head = 1 << (stored_columns(columns, sizes).bit_length() - 1)
    rest = stored_columns(columns, sizes) - head
    least = min_columns(weight, shape["num_warps"]) if shape["FEATURES"] > 2 else 1  # see `gemv_tile_sizes`
    tail = {"HEAD": head, "TAIL_P": max(next_power_of_2(rest), least) if rest else 0}
    tiles = feature_tiles(features, shape) * use_gemv(batch, x, weight, scale)
    launch(megalodon_linear_gemv, (tiles,))(*tensors, **sizes, **tail, **shape)
    for use, shape in gemm_launches(batch, features, x, weight, scale):
        grid = (feature_tiles(features, shape) * use, batch_tiles(batch, shape))
        launch(megalodon_linear_gemm, grid)(*tensors, **sizes, **shape)
    return y
