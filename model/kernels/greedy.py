"""The most probable token of every row, and whether its logits have one: a decode program's last kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from ..logit_errors import ALL_MASKED, POSITIVE_INFINITY
from .launch import kernel, power_of_2, programmatic, start, wait

_BLOCK = 8192  # logits that a program compares at a time
_UNROLLED = 8  # blocks of which all are on their way at once


@triton_op("megalodon::choose_greedy", mutates_args={"choice"})
def choose_greedy(logits: Tensor, choice: Tensor) -> None:
    """Into choice (2, B) int64, from logits (B, V) float32: the first of the most probable tokens, and a fault.

    A fault is 0, or how many logits are NaN, or POSITIVE_INFINITY or ALL_MASKED; the token beside it is 0.
    """
    batch, vocabulary = logits.shape
    block = min(power_of_2(vocabulary), _BLOCK)
    kernel(megalodon_greedy)[(batch,)](
        *(logits, choice, batch),
        V=vocabulary,
        BLOCK=block,
        UNROLLED=vocabulary <= _UNROLLED * block,
        PLUS=POSITIVE_INFINITY,
        NOTHING=ALL_MASKED,
        PDL=programmatic(logits),
        num_warps=max(block // 256, 1),
    )


@triton.jit
def compared(row_ptr, index, V: tl.constexpr, best, token, unknown):
    """The best so far at each place of a block, its tokens, and how many were NaN there, with one more block."""
    x = tl.load(row_ptr + index, mask=index < V, other=float("-inf"))
    better = x > best  # the first of equal ones stays; NaN is never better
    return tl.where(better, x, best), tl.where(better, index, token), unknown + (x != x).to(tl.int32)


@triton.jit
def megalodon_greedy(
    logits_ptr,
    choice_ptr,
    batch,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLLED: tl.constexpr,
    PLUS: tl.constexpr,
    NOTHING: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row."""
    start(PDL)
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    token = tl.zeros((BLOCK,), tl.int32)
    unknown = tl.zeros((BLOCK,), tl.int32)
    wait(PDL)
    row_ptr = logits_ptr + row * V
    if UNROLLED:
        for first in tl.static_range(0, V, BLOCK):
            best, token, unknown = compared(row_ptr, first + offsets, V, best, token, unknown)
    else:
        for first in range(0, V, BLOCK):
            best, token, unknown = compared(row_ptr, first + offsets, V, best, token, unknown)
    peak = tl.max(best, 0)
    chosen = tl.min(tl.where(best == peak, token, V), 0)
    fault = tl.where(peak == float("inf"), PLUS, tl.where(peak == float("-inf"), NOTHING, 0))
    count = tl.sum(unknown, 0)
    fault = tl.where(count > 0, count, fault)
    tl.store(choice_ptr + row, tl.where(fault == 0, chosen, 0).to(tl.int64))
    tl.store(choice_ptr + batch + row, fault.to(tl.int64))
