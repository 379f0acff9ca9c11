"""Products with one row as plain sums, which Inductor compiles to loops that stream the matrix over all threads.

A decode step of one stream is bound by reading every matrix once. The libraries behind torch.mm and torch.bmm are not
made for that: they read on one thread (float32), or slower still (bfloat16). These functions compute the same
products, accumulated in float32 or better; `stream_products` puts them in the place of the libraries' calls. They are
for a batch that is 1 in the graph: with a symbolic one Inductor takes the batch for the dimension to share out.
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
    """x (B, K) times a QuantizedLinear's weights transposed, plus bias (N); no dequantised matrix is ever stored.

    Rows one after the other: more of them at the same time, as in `linear`, were no faster for integers.
    """
    product = (_int8_product if weight.dtype == torch.int8 else _int4_product)(_wide(x), weight, scale)
    return (product if bias is None else product + bias).to(x.dtype)


def _int8_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return ((weight[:, None].to(x.dtype) * x).sum(-1) * scale.to(x.dtype)).T


def _int4_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Both halves of a row from the same bytes; a group in parts of LANES features, one vector each."""
    group = x.shape[1] // scale.shape[1]
    lanes = LANES if group % LANES == 0 else group

    def parts(half: Tensor) -> tuple[Tensor, ...]:  # (..., K/2) -> (..., groups, lanes), for each part of the groups
        return half.unflatten(-1, (-1, group // lanes, lanes)).unbind(-2)

    low_x, high_x = (parts(half) for half in x.chunk(2, dim=-1))  # (B, groups, lanes)
    packed = [part.int() for part in parts(weight[:, None])]  # (N, 1, groups, lanes)
    low = sum(((part & 15).to(x.dtype) - ZERO) * features for part, features in zip(packed, low_x, strict=True))
    high = sum(((part >> 4).to(x.dtype) - ZERO) * features for part, features in zip(packed, high_x, strict=True))
    low_scale, high_scale = (half[:, None, :, None].to(x.dtype) for half in scale.chunk(2, dim=-1))
    return (low * low_scale + high * high_scale).sum((-2, -1)).T


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
    """Replace linear layers of (B, K) and batched products of one row in a traced decode stage."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        if node.args[0].meta["val"].dim() == 2:
            x, weight, *bias = node.args
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
