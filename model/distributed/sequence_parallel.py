"""Sequence parallelism, as the original's chunk parallel mode: a long sequence in equal pieces over processes.

A piece is whole chunks, so the norms' statistics and the EMA's state alone cross from one piece to the next. Each layer
waits for them and passes its own on before it attends. The processes therefore work on their pieces at the same time,
each a little behind the one before. Gradients travel the same way back.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from ..blocking import first
from ..blocks import MegalodonBlock
from ..loss import IGNORED, cross_entropy
from ..norm import NormState
from ..plan import PrefillPlan
from ..rotary import Rotary
from .sequence_state import SequenceParallelState

if TYPE_CHECKING:
    from ..transformers_api.blocks import MegalodonDecoderLayer
    from ..transformers_api.modeling import MegalodonForCausalLM


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
    group = group or dist.group.WORLD
    if group is None:
        raise RuntimeError("there is no process group; call torch.distributed.init_process_group first")
    piece = piece_of(token_ids, model.config.chunk_size, group)
    return _run(model, _piece_logits, piece, SequenceParallelState(group))


def _piece_logits(model: MegalodonForCausalLM, piece: Tensor, state: SequenceParallelState) -> Tensor:
    """The pass over a piece: `Megalodon.prefill` without a cache, with states that come from the process before."""
    body = model.model
    lengths = torch.full_like(piece[:, 0], piece.shape[1])
    x, plan, rotary = body.begin_prefill(piece, lengths, torch.full_like(lengths, state.rank * piece.shape[1]))
    for layer in body.layers:
        x = _layer(cast("MegalodonDecoderLayer", layer), x, plan, rotary, state)
    norm = body.norm
    initial = norm.initial_state(x.shape[0], x.device)
    x, last = norm(x, plan, NormState(*state.receive(norm, initial, x, norm)))
    return model.logits(first(state.send(norm, x, last), 1, piece.shape[1]))


def _layer(
    layer: MegalodonDecoderLayer, x: Tensor, plan: PrefillPlan, rotary: Rotary, state: SequenceParallelState
) -> Tensor:
    """A layer, with gradient checkpointing if that is enabled."""
    if not (layer.gradient_checkpointing and layer.training and torch.is_grad_enabled()):
        return _run(layer, _layer_forward, x, plan, rotary, state)
    y: Tensor = layer._gradient_checkpointing_func(_run, layer, _layer_forward, x, plan, rotary, state)
    return y


def _layer_forward(
    layer: MegalodonBlock, x: Tensor, plan: PrefillPlan, rotary: Rotary, state: SequenceParallelState
) -> Tensor:
    """`MegalodonBlock.forward`, whose recurrence goes on from the process before and is passed on before attention."""
    attn = layer.attn
    norm, ema = attn.states(x, None)
    initial = (*norm, attn.cema.initial_state(x) if ema is None else ema)
    *norm_state, ema = state.receive(attn, initial, x, attn.timenorm, attn.cema)
    x_norm, y, norm, ema = attn.recurrence(x, plan, NormState(*norm_state), ema)
    y = state.send(attn, y, (*norm, ema))
    return layer.ffn(attn.behind_recurrence(x, x_norm, y, plan, rotary, None), x)  # type: ignore[no-any-return]


_METHOD = "sequence_parallel_forward"


def _run(module: nn.Module, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """function(module, *arguments); where FSDP2 has sharded the module, between its hooks, which gather the weights."""
    if not isinstance(module, FSDPModule):
        return function(module, *arguments)
    vars(module)[_METHOD] = MethodType(function, module)
    register_fsdp_forward_method(module, _METHOD)
    result: Tensor = getattr(module, _METHOD)(*arguments)
    return result


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
