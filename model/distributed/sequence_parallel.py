"""Sequence parallelism, as the original's chunk parallel mode: a long sequence in equal pieces over processes.

Only the norms' statistics and the EMA's state cross from one piece to the next, since a piece is whole chunks. Each
layer waits for them and passes its own on before it attends, so the processes work on their pieces at the same time,
each a little behind the one before. Gradients travel the same way back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..loss import IGNORED, cross_entropy

if TYPE_CHECKING:
    from ..modeling import MegalodonForCausalLM


def piece_of(x: Tensor, chunk: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """This process's piece of x (B, L), the same in every process: the rank-th of equal pieces, (B, L / processes).

    ValueError unless the pieces are whole chunks of `chunk` tokens.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    length = x.shape[1]
    if length % (size * chunk):
        raise ValueError(
            f"a sequence of {length} tokens cannot be split over {size} processes in whole chunks of {chunk}; pad it "
            f"at its end to a multiple of {size * chunk}, with {IGNORED} as labels"
        )
    return x.chunk(size, dim=1)[rank]


def parallel_logits(model: MegalodonForCausalLM, token_ids: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Logits (B, L / processes, V) of this process's piece of token_ids (B, L), which every process is given whole."""
    piece = piece_of(token_ids, model.config.chunk_size, group)
    model.model.sequence_group = group or dist.group.WORLD
    try:
        logits: Tensor = model(piece, use_cache=False).logits
    finally:
        model.model.sequence_group = None
    return logits


def parallel_loss(
    model: MegalodonForCausalLM, token_ids: Tensor, labels: Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The loss of `model(token_ids, labels=labels)`, computed piece by piece; arguments (B, L) whole in every process.

    The value is the whole loss everywhere; its gradients are this process's share, which `sum_gradients` adds up.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    logits = parallel_logits(model, token_ids, group)
    piece = piece_of(targets, model.config.chunk_size, group)
    share = cross_entropy(logits, piece, (targets != IGNORED).sum())
    total = share.detach().clone()
    dist.all_reduce(total, group=group)
    return share + (total - share.detach())


def sum_gradients(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Add up the gradients of all processes, after the backward pass of `parallel_loss`."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=group)
