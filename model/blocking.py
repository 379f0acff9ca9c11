"""Cutting a length into blocks and back, in forms that torch.export accepts for every length from 1 on.

With a symbolic length, a slice [:L] of a padded tensor and a broadcasting batched matmul each add a guard that some
length or batch size breaks ("L != 1"); the forms here do not. Nothing is padded or cut where a length is known to be a
multiple of the block. `Megalodon.prefill` makes it one, so the symbolic shapes of a graph stay short.

    to_blocks(x, 1, 32)        x (B, 70, D) -> (B, 3, 32, D), zeros at the end
    from_blocks(y, 1, 70)      and back
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# A private interface of torch, and the core's only one. Without it, a comparison of symbolic sizes that torch cannot
# decide would become a condition of the exported program, which some batch or length then breaks.


def known(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds for every value of the symbols in it; False if a trace cannot tell."""
    if torch.compiler.is_dynamo_compiling() or isinstance(condition, torch.SymBool):
        # Not imported above: symbolic shapes import sympy, which takes longer than opening a bundle. Whoever traces has
        # imported them.
        return torch.fx.experimental.symbolic_shapes.statically_known_true(condition)
    return condition


def padding_to(length: int, size: int) -> int:
    """How much is missing to the next multiple of `size`."""
    return 0 if known(length % size == 0) else (size - length % size) % size


def to_blocks(x: Tensor, dim: int, size: int, count: int | None = None) -> Tensor:
    """Split dimension `dim` of length L into (ceil(L / size), size), zero-padded at the end.

    A caller who has that number gives it as `count`: sizes of a traced graph stay free of remainders.
    """
    length = x.shape[dim]
    missing = padding_to(length, size) if count is None else count * size - length
    if not known(missing == 0):
        # Padding by 0, in a compiled graph, keeps the strides of x, so x must have those that padding would give it.
        x = F.pad(compact(x), [0, 0] * (x.dim() - dim - 1) + [0, missing])
    return x.unflatten(dim, (x.shape[dim] // size if count is None else count, size))


def from_blocks(x: Tensor, dim: int, length: int) -> Tensor:
    """Undo `to_blocks`: join dimensions `dim` and `dim + 1`, keep the first `length`."""
    return first(x.flatten(dim, dim + 1), dim, length)


def first(x: Tensor, dim: int, length: int) -> Tensor:
    """The first `length` entries of a dimension."""
    if known(x.shape[dim] == length):
        return x
    return x.index_select(dim, torch.arange(length, device=x.device))


def compact(x: Tensor) -> Tensor:
    """A contiguous copy of a transposed view, without asking whether it is contiguous already (a guard)."""
    return x.clone(memory_format=torch.contiguous_format)


def batched_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (..., m, k) @ b (..., k, n) with equal batch dimensions."""
    batch = a.shape[:-2]
    return torch.bmm(a.flatten(0, -3), b.flatten(0, -3)).unflatten(0, batch)
