"""Products with one row as plain sums, which Inductor compiles to loops that stream the matrix over all threads.

A decode step of one stream is bound by reading every matrix once. The libraries behind torch.mm and torch.bmm are not
made for that: they read on one thread (float32), or slower still (bfloat16). These functions compute the same
products, accumulated in float32 or better; `stream_products` puts them in the place of the libraries' calls. With a
symbolic batch Inductor shares out the batch: good for attention, whose rows have keys of their own, not for weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..model.quantized import ZERO

ROWS = 4  # rows of a matrix read at the same time: one row at a time leaves the memory waiting at each page's end
TERMS = 8  # likewise where rows are added up; more of them would share the few places of a cache set
PARTS = 16  # and as many partial sums at a time
LANES = 16  # features of int4 groups taken at a time: a vector of float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (B, K) times weight (N, K) transposed, plus bias (N): aten.linear."""
    parts = weight.unflatten(0, (_divisor(weight.shape[0], ROWS), -1)).unbind(0)
    wide = _wide(x)[None]  # (1, B, K)
    product = torch.cat([(_wide(part)[:, None] * wide).sum(-1) for part in parts]).T  # of (N, B)
    return (product if bias is None else product + bias).to(x.dtype)


def quantized_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (B, K) times a QuantizedLinear's weights transposed, plus bias (N); no dequantised matrix is ever stored."""
    wide = _wide(x)
    int8 = weight.dtype == torch.int8
    product = linear(wide, weight) * scale.T.to(wide.dtype) if int8 else _int4_product(wide, weight, scale)
    return (product if bias is None else product + bias).to(x.dtype)


def _int4_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Both halves of a row from the same bytes; a group in parts of LANES features, one vector each."""
    half, group = x.shape[1] // 2, x.shape[1] // scale.shape[1]
    lanes = LANES if group % LANES == 0 else group

    def parts(row: Tensor) -> tuple[Tensor, ...]:  # (..., K/2) -> (..., groups, lanes), for each part of the groups
        return row.unflatten(-1, (-1, group // lanes, lanes)).unbind(-2)

    packed = [part.int() for part in parts(weight[:, None])]  # (N, 1, groups, lanes)
    low = [((part & 15).to(x.dtype) - ZERO) * y for part, y in zip(packed, parts(x[:, :half]), strict=True)]
    high = [((part >> 4).to(x.dtype) - ZERO) * y for part, y in zip(packed, parts(x[:, half:]), strict=True)]
    low_scale, high_scale = (scales[:, None, :, None].to(x.dtype) for scales in scale.chunk(2, dim=-1))
    total = sum(low[1:], low[0]) * low_scale + sum(high[1:], high[0]) * high_scale
    return total.sum((-2, -1)).T


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
        x, weight, *bias = node.args
        rows = x.meta["val"].shape[0]
        if isinstance(rows, int) and rows == 1:
            stored = _stored(weight)
            node.target, node.args = (quantized_linear if len(stored) > 1 else linear), (x, *stored, *bias)
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.bmm.default):
        left, right = (argument.meta["val"] for argument in node.args)
        if left.shape[1] == 1:
            node.target = mixture if right.stride(2) == 1 else scores
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.erase_node(node)  # of conversions; they would keep the dequantised matrices alive
    graph.eliminate_dead_code()


def _stored(weight: fx.Node) -> list[fx.Node]:
    """The inputs of a stage that a matrix is computed from: itself, or a quantised one's integers and scales."""
    found, waiting = [], [weight]
    while waiting:
        node = waiting.pop()
        found += [node] if node.op == "placeholder" and node not in found else []
        waiting += node.all_input_nodes
    return sorted(found, key=lambda node: node.meta["val"].is_floating_point())


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _divisor(size: int, most: int) -> int:
    """The largest power of two up to `most` that divides a size."""
    while size % most:
        most //= 2
    return most
