"""The most probable token of every row, and why a row has none: the last kernel of a decode program."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, inf
from torch.library import triton_op

from ...logit_errors import ALL_MASKED, POSITIVE_INFINITY
from ..launch import grid_dependency_wait, launch, launch_dependents, next_power_of_2, supports_pdl

_BLOCK = 8192  # logits that a program compares at a time
_MAX_UNROLLED = 8  # blocks up to which the loads of all of them are issued at once


def argmax_reference(logits: Tensor, next_tokens: Tensor) -> None:
    """Into next_tokens (2, B): the first largest of logits (B, V), and the row's logit error, beside which it is 0."""
    largest, token = logits.nan_to_num(nan=-inf, posinf=inf, neginf=-inf).max(-1)
    error = logits.isnan().sum(-1)
    error[(error == 0) & (largest == inf)] = POSITIVE_INFINITY
    error[(error == 0) & (largest == -inf)] = ALL_MASKED
    next_tokens[0], next_tokens[1] = token.where(error == 0, 0), error


@triton_op("megalodon::argmax", mutates_args={"next_tokens"})
def argmax(logits: Tensor, next_tokens: Tensor) -> None:
    """Into next_tokens (2, B) int64, from logits (B, V) float32: the most probable tokens, and the logit errors.

    Among equal logits the first wins. Where a row's error (`model/logit_errors.py`) is not 0, its token is 0.
    """
    batch, vocabulary = logits.shape
    block = min(next_power_of_2(vocabulary), _BLOCK)
    launch(megalodon_argmax, (batch,))(
        *(logits, next_tokens, batch),
        V=vocabulary,
        BLOCK=block,
        UNROLLED=vocabulary <= _MAX_UNROLLED * block,
        POSITIVE_INFINITY=POSITIVE_INFINITY,
        ALL_MASKED=ALL_MASKED,
        PDL=supports_pdl(logits),
        num_warps=max(block // 256, 1),
    )


@triton.jit
def compare_block(row_ptr, index, V: tl.constexpr, best, token, nans):
    """With one more block of logits, at `index` (BLOCK): at each place the best, its token, and the number of NaNs."""
    x = tl.load(row_ptr + index, mask=index < V, other=float("-inf"))
    better = x > best  # the first of equal ones stays; NaN is never better
    return tl.where(better, x, best), tl.where(better, index, token), nans + (x != x).to(tl.int32)


@triton.jit
def megalodon_argmax(
    logits_ptr, next_tokens_ptr,
    batch,
    V: tl.constexpr, BLOCK: tl.constexpr, UNROLLED: tl.constexpr,
    POSITIVE_INFINITY: tl.constexpr, ALL_MASKED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """next_tokens[0] = the first largest of each row's logits, next_tokens[1] = the row's logit error.

    In: logits (B, V) float32. Out: next_tokens (2, B) int64. Grid: (B,), one row a program. The best value, its token
    and the number of NaNs at each of BLOCK places stay in registers over the blocks of the row.
    """
    launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    token = tl.zeros((BLOCK,), tl.int32)
    nans = tl.zeros((BLOCK,), tl.int32)
    grid_dependency_wait(PDL)
    row_ptr = logits_ptr + row * V
    if UNROLLED:
        for first in tl.static_range(0, V, BLOCK):
            best, token, nans = compare_block(row_ptr, first + offsets, V, best, token, nans)
    else:
        for first in range(0, V, BLOCK):
            best, token, nans = compare_block(row_ptr, first + offsets, V, best, token, nans)
    largest = tl.max(best, 0)
    chosen = tl.min(tl.where(best == largest, token, V), 0)
    infinite = largest == float("inf")
    error = tl.where(infinite, POSITIVE_INFINITY, tl.where(largest == float("-inf"), ALL_MASKED, 0))
    count = tl.sum(nans, 0)
    error = tl.where(count > 0, count, error)
    tl.store(next_tokens_ptr + row, tl.where(error == 0, chosen, 0).to(tl.int64))
    tl.store(next_tokens_ptr + batch + row, error.to(tl.int64))
