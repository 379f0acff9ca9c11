"""Matrix-vector products (GEMV) as plain sums, which Inductor compiles to loops that read the matrix on all threads.

A decode step of one stream is bound by the memory bandwidth: it reads every matrix once. The libraries behind torch.mm
and torch.bmm read it on one thread in float32, and slower still in bfloat16. The functions here compute the same
products, accumulated in float32 or better, and `rewrite_gemv` replaces the libraries' calls in a traced graph by them.

A linear layer is rewritten where its batch is exactly 1. A product of attention is rewritten at a symbolic batch too:
Inductor then divides the batch among threads, which suits keys that belong to one row, not weights that all rows share.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..model.quantized import ZERO

INTERLEAVED = 4  # matrix rows read at the same time: one at a time leaves the memory idle at each page's end
TERMS = 8  # matrix rows added up at the same time; more of them would compete for the ways of a cache set
PARTIAL_SUMS = 16  # sums of TERMS rows added up at the same time
LANES = 16  # features of an int4 group taken at a time: a vector of float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """aten.linear as sums: x (B, K) times weight (N, K) transposed, plus bias (N) -> (B, N)."""
    blocks = weight.unflatten(0, (_divisor(weight.shape[0], INTERLEAVED), -1)).unbind(0)
    wide = _wide(x)[None]  # (1, B, K)
    product = torch.cat([(_wide(block)[:, None] * wide).sum(-1) for block in blocks]).T  # of (N, B)
    return (product if bias is None else product + bias).to(x.dtype)


def quantized_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """QuantizedLinear as sums: x (B, K) times its weights (N, K) transposed, plus bias (N) -> (B, N).

    No dequantised matrix is ever stored.
    """
    wide = _wide(x)
    int8 = weight.dtype == torch.int8
    product = linear(wide, weight) * scale.T.to(wide.dtype) if int8 else _int4_product(wide, weight, scale)
    return (product if bias is None else product + bias).to(x.dtype)


def _int4_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x (B, K) times int4 weights, uint8 (N, K/2), with scales (N, groups) -> (B, N).

    Each byte holds a feature of the low and one of the high half of K, so both halves come from the same bytes. A group
    is taken LANES features at a time, one vector each.
    """
    half, group = x.shape[1] // 2, x.shape[1] // scale.shape[1]
    lanes = LANES if group % LANES == 0 else group

    def vectors(row: Tensor) -> tuple[Tensor, ...]:  # (..., K/2) -> (..., groups, lanes), as many as a group has
        return row.unflatten(-1, (-1, group // lanes, lanes)).unbind(-2)

    packed = [vector.int() for vector in vectors(weight[:, None])]  # (N, 1, groups, lanes)
    low = [((vector & 15).to(x.dtype) - ZERO) * y for vector, y in zip(packed, vectors(x[:, :half]), strict=True)]
    high = [((vector >> 4).to(x.dtype) - ZERO) * y for vector, y in zip(packed, vectors(x[:, half:]), strict=True)]
    low_scale, high_scale = (scales[:, None, :, None].to(x.dtype) for scales in scale.chunk(2, dim=-1))
    total = sum(low[1:], low[0]) * low_scale + sum(high[1:], high[0]) * high_scale
    return total.sum((-2, -1)).T


def scores(query: Tensor, keys: Tensor) -> Tensor:
    """aten.bmm as sums: query (B, 1, K) times keys (B, K, C), a transposed view of contiguous (B, C, K)."""
    return (_wide(keys.mT) * _wide(query)).sum(-1)[:, None].to(query.dtype)


def pv_matmul(weights: Tensor, values: Tensor) -> Tensor:
    """aten.bmm as sums: weights (B, 1, C) times contiguous values (B, C, E) -> (B, 1, E).

    It adds TERMS rows at a time, then PARTIAL_SUMS of those sums at a time.
    """
    terms = _divisor(values.shape[1], TERMS)
    rows = values.unflatten(1, (terms, -1)).unbind(1)  # each (B, C / terms, E)
    columns = weights.mT.unflatten(1, (terms, -1)).unbind(1)  # each (B, C / terms, 1)
    products = [_wide(weight) * _wide(row) for weight, row in zip(columns, rows, strict=True)]
    total = sum(products[1:], products[0])
    total = total.unflatten(1, (-1, _divisor(total.shape[1], PARTIAL_SUMS))).sum(2)
    return total.sum(1, keepdim=True).to(values.dtype)


def rewrite_gemv(graph: fx.Graph) -> None:
    """Replace attention's products, and linear layers at batch 1, in the traced graph of a decode stage."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        x, weight, *bias = node.args
        rows = x.meta["val"].shape[0]
        if isinstance(rows, int) and rows == 1:
            stored = _stored(weight)
            node.target, node.args = (quantized_linear if len(stored) > 1 else linear), (x, *stored, *bias)
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.bmm.default):
        left, right = (argument.meta["val"] for argument in node.args)
        if left.shape[1] == 1:
            node.target = pv_matmul if right.stride(2) == 1 else scores
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.erase_node(node)  # the checks of conversions would keep the dequantised matrices alive
    graph.eliminate_dead_code()


def _stored(weight: fx.Node) -> list[fx.Node]:
    """The stage's inputs that a matrix is computed from: the matrix itself, or the integers and scales of one."""
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
