"""Elementwise operations behind the matrix products of a prefill, as one kernel; ONNX Runtime does not fuse them.

    silu(linear(x, w, b)) * gate      one product, then one kernel
    x + alpha * linear(h, w)          likewise

`fuse` rewrites a traced stage: the product keeps its node, and everything elementwise behind it becomes one operation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, fx
from torch.library import triton_op

from ...model.kernels.elementwise import silu
from ...model.kernels.launch import grid_dependency_wait, launch, launch_dependents, next_power_of_2, supports_pdl

aten = torch.ops.aten
_BLOCK = 2048  # features that a program takes


def pointwise_reference(
    product: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    alpha: Tensor | None,
    residual: Tensor | None,
    activate: bool,
) -> Tensor:
    """residual + alpha * gate * silu(product + bias), without the terms that are None; rounded once."""
    y = product.float() if bias is None else product.float() + bias.float()
    y = F.silu(y) if activate else y
    for factor in (gate, alpha):
        y = y if factor is None else y * factor.float()
    return (y if residual is None else residual.float() + y).to(product.dtype)


@triton_op("megalodon::pointwise", mutates_args={})
def pointwise(
    product: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    alpha: Tensor | None,
    residual: Tensor | None,
    activate: bool,
) -> Tensor:
    """residual + alpha * gate * silu(product + bias), without the terms that are None; silu only with `activate`.

    product, gate, residual (B, L, N); bias, alpha (N) -> (B, L, N) in the product's dtype.
    """
    batch, length, features = product.shape
    y = torch.empty_like(product)
    block = min(next_power_of_2(features), _BLOCK)
    given = {"BIAS": bias, "GATE": gate, "ALPHA": alpha, "RESIDUAL": residual}
    tensors = [product if t is None else t for t in given.values()]
    launch(megalodon_pointwise, (batch * length, -(-features // block)))(
        *(product, *tensors, y),
        **{name: t is not None for name, t in given.items()},
        N=features,
        BLOCK=block,
        ACTIVATE=activate,
        PDL=supports_pdl(product),
        num_warps=max(block // 256, 1),
    )
    return y


@triton.jit
def megalodon_pointwise(
    product_ptr, bias_ptr, gate_ptr, alpha_ptr, residual_ptr, y_ptr,
    N: tl.constexpr, BLOCK: tl.constexpr,
    BIAS: tl.constexpr, GATE: tl.constexpr, ALPHA: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y = residual + alpha * gate * silu(product + bias), each term only if its flag is set.

    In: product, gate, residual (rows, N); bias, alpha (N). Out: y (rows, N). Grid: (rows, ceil(N / BLOCK)).
    """
    launch_dependents(PDL)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = feature < N
    at = tl.program_id(0).to(tl.int64) * N + feature
    bias = tl.zeros((BLOCK,), tl.float32)
    alpha = tl.full((BLOCK,), 1.0, tl.float32)
    if BIAS:
        bias += tl.load(bias_ptr + feature, mask=ok, other=0.0).to(tl.float32)
    if ALPHA:
        alpha = tl.load(alpha_ptr + feature, mask=ok, other=0.0).to(tl.float32)
    grid_dependency_wait(PDL)
    y = tl.load(product_ptr + at, mask=ok, other=0.0).to(tl.float32) + bias
    if ACTIVATE:
        y = silu(y)
    if GATE:
        y *= tl.load(gate_ptr + at, mask=ok, other=0.0).to(tl.float32)
    y *= alpha
    if RESIDUAL:
        y += tl.load(residual_ptr + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=ok)


def fuse(graph: fx.Graph) -> None:
    """Put one `pointwise` behind each matrix product of (B, L, K), in the place of what is elementwise there."""
    for product in list(graph.find_nodes(op="call_function", target=aten.linear.default)):
        if product.meta["val"].dim() == 3:
            _fuse_behind(graph, product)
    graph.eliminate_dead_code()


def _fuse_behind(graph: fx.Graph, product: fx.Node) -> None:
    x, weight, *rest = product.args
    bias = rest[0] if rest else None
    end, activate, gate, alpha, residual = product, False, None, None, None
    user = _only_user(end)
    if user is not None and user.target is aten.silu.default:
        end, activate, user = user, True, _only_user(user)
    if user is not None and user.target is aten.mul.Tensor:
        other = _other(user, end)
        if isinstance(other, fx.Node) and other.meta["val"].dim() == 3 and activate:
            end, gate = user, other
        elif isinstance(other, fx.Node) and other.meta["val"].dim() == 1:
            end, alpha = user, other
        user = _only_user(end)
    if user is not None and user.target is aten.add.Tensor and not user.kwargs:
        other = _other(user, end)
        if isinstance(other, fx.Node) and other.meta["val"].shape == end.meta["val"].shape:
            end, residual = user, other
    if end is product and bias is None:
        return
    with graph.inserting_before(end):
        alone = graph.call_function(aten.linear.default, (x, weight))
        terms = alone, bias, gate, alpha, residual, activate
        fused = graph.call_function(torch.ops.megalodon.pointwise.default, terms)
    alone.meta["val"], fused.meta["val"] = product.meta["val"], end.meta["val"]
    end.replace_all_uses_with(fused)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _other(user: fx.Node, node: fx.Node) -> Any:
    """The other argument of a sum or a product of two."""
    first, second = user.args[:2]
    return second if first is node else first
