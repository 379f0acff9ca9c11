"""Products with one row as plain sums, which Inductor compiles to loops that stream the matrix over all threads.

A decode step of one stream is bound by reading every matrix once. The libraries behind torch.mm and torch.bmm are not
made for that: they read on one thread (float32), or slower still (bfloat16). These functions compute the same
products, accumulated in float32 or better; `stream_products` puts them in the place of the libraries' calls. With a
symbolic batch Inductor shares out the batch: good for attention, whose rows have keys of their own, not for weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

ROWS = 4  # rows of a matrix read at the same time: one row at a time leaves the memory waiting at each page's end
TERMS = 8  # likewise where rows are added up; more of them would share the few places of a cache set
PARTS = 16  # and as many partial sums at a time


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (B, K) times weight (N, K) transposed, plus bias (N): aten.linear."""
    parts = weight.unflatten(0, (_divisor(weight.shape[0], ROWS), -1)).unbind(0)
    wide = _wide(x)[None]  # (1, B, K)
    product = torch.cat([(_wide(part)[:, None] * wide).sum(-1) for part in parts]).T  # of (N, B)
    return (product if bias is None else product + bias).to(x.dtype)


def scores(query: Tensor, keys: Tensor) -> Tensor:
    """query (B, 1, K) times keys (B, K, C), a transposed view of contiguous (B, C, K): aten.bmm."""
    return (_wide(keys.mT) * _wide(query)).sum(-1)[:, None].to(query.dtype)


def mixture(weights: Tensor, values: Tensor) -> Tensor:
    """weights (B, 1, C) times contiguous values (B, C, E): aten.bmm. Adds some rows at a time, then those sums."""
    terms = _divisor(values.shape[1], TERMS)
    rows = values.unflatten(1, (terms, -1)).unbind(1)  # each (B, C / terms, E)
    shares = weights.mT.unflatten(1, (terms, -1)).unbind(1)  # each (B, C / terms, 1)
    products = [_wide(share) * _wide(row) for share, row in zip(shares, rows, strict=True)]
    total = sum(products[1:], products[0])
    total = total.unflatten(1, (-1, _divisor(total.shape[1], PARTS))).sum(2)
    return total.sum(1, keepdim=True).to(values.dtype)


def stream_products(graph: fx.Graph) -> None:
    """Replace batched products of one row, and linear layers of one row, in a traced decode stage."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        rows = node.args[0].meta["val"].shape[0]
        if isinstance(rows, int) and rows == 1:
            node.target = linear
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.bmm.default):
        left, right = (argument.meta["val"] for argument in node.args)
        if left.shape[1] == 1:
            node.target = mixture if right.stride(2) == 1 else scores


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _divisor(size: int, most: int) -> int:
    """The largest power of two up to `most` that divides a size."""
    while size % most:
        most //= 2
    return most
