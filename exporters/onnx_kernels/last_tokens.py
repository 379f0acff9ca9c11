"""One token of each row, as a kernel.

ONNX Runtime's GatherND copies sizes from the host's memory at each run. A captured CUDA graph would read that memory
again after it is free.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, fx
from torch.library import triton_op

from ...model.kernels.launch import grid_dependency_wait, launch, launch_dependents, next_power_of_2, supports_pdl

aten = torch.ops.aten
_BLOCK = 1024  # features that a program copies


def take_tokens_reference(x: Tensor, index: Tensor) -> Tensor:
    """x (B, L, D) at token index[b] of each row: (B, D)."""
    return x[torch.arange(x.shape[0]), index]


@triton_op("megalodon::take_tokens", mutates_args={})
def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x (B, L, D) at token index[b] of each row: (B, D); index (B) int64."""
    batch, length, dim = x.shape
    y = x.new_empty(batch, dim)
    block = min(next_power_of_2(dim), _BLOCK)
    launch(megalodon_take_tokens, (batch, -(-dim // block)))(
        *(x, index, y, length), D=dim, BLOCK=block, PDL=supports_pdl(x), num_warps=4
    )
    return y


@triton.jit
def megalodon_take_tokens(x_ptr, index_ptr, y_ptr, L, D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """y[b] = x[b, index[b]]. In: x (B, L, D); index (B). Out: y (B, D). Grid: (B, ceil(D / BLOCK))."""
    launch_dependents(PDL)
    b = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    grid_dependency_wait(PDL)
    token = tl.load(index_ptr + b)
    tl.store(y_ptr + b * D + k, tl.load(x_ptr + (b * L + token) * D + k, mask=k < D), mask=k < D)


def replace_indexing(graph: fx.Graph) -> None:
    """Put `take_tokens` in the place of x[arange(B), index] of a tensor (B, L, D)."""
    for node in list(graph.find_nodes(op="call_function", target=aten.index.Tensor)):
        x, indices = node.args
        if x.meta["val"].dim() != 3 or len(indices) != 2 or None in indices:
            continue
        rows, index = indices
        if rows.target is not aten.arange.default or index.meta["val"].dim() != 1:
            continue
        with graph.inserting_before(node):
            taken = graph.call_function(torch.ops.megalodon.take_tokens.default, (x, index))
        taken.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(taken)
    graph.eliminate_dead_code()
