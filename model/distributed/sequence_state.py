"""The state that sequence parallelism passes from process to process, and its gradients on the way back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SequenceParallelState:
    """One forward pass: each layer receives states from the process before, and sends its own to the one after."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        # Gradient checkpointing runs a layer twice. The second time nothing is received or sent.
        self._received: dict[nn.Module, Tensor] = {}
        self._sent: set[nn.Module] = set()

    def receive(self, owner: nn.Module, states: Sequence[Tensor], x: Tensor, *modules: nn.Module) -> Sequence[Tensor]:
        """The states (B, ...) that the process before sends for the same owner; the first process keeps `states`.

        `x` goes through `modules` with them. If anything of these takes gradients, so do the states, in both processes.
        """
        if self.rank == 0:
            return states
        tracked = x.requires_grad or any(p.requires_grad for module in modules for p in module.parameters())
        flat = torch.cat([state.flatten(1) for state in states], dim=1).detach().requires_grad_(tracked)
        packed = _Receive.apply(flat, self, owner)
        pieces = packed.split([state[0].numel() for state in states], dim=1)
        return [piece.view_as(state) for piece, state in zip(pieces, states, strict=True)]

    def send(self, owner: nn.Module, x: Tensor, states: Sequence[Tensor]) -> Tensor:
        """Send states to the process after; returns x, through which their gradients come back."""
        if self.rank == self.size - 1:
            return x
        packed = torch.cat([state.flatten(1) for state in states], dim=1)
        sent: Tensor = _Send.apply(x, packed, self, owner)
        return sent

    def received(self, owner: nn.Module, like: Tensor) -> Tensor:
        """What arrived for an owner; waits for it the first time."""
        if owner not in self._received:
            self._received[owner] = torch.empty_like(like)
            dist.recv(self._received[owner], group=self.group, group_src=self.rank - 1)
        return self._received[owner]

    def send_once(self, owner: nn.Module, packed: Tensor) -> None:
        """Send, unless that has been done for this owner."""
        if owner not in self._sent:
            self._sent.add(owner)
            dist.send(packed.contiguous(), group=self.group, group_dst=self.rank + 1)


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, like: Tensor, state: SequenceParallelState, owner: nn.Module) -> Tensor:
        ctx.state = state
        return state.received(owner, like).clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        state: SequenceParallelState = ctx.state
        dist.send(gradients[0].contiguous(), group=state.group, group_dst=state.rank - 1)
        return gradients[0], None, None


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, state: SequenceParallelState, owner: nn.Module) -> Tensor:
        ctx.state, ctx.like = state, torch.empty_like(packed, device="meta")
        state.send_once(owner, packed)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        state: SequenceParallelState = ctx.state
        arrived = torch.empty_like(ctx.like, device=gradients[0].device)
        dist.recv(arrived, group=state.group, group_src=state.rank + 1)
        return gradients[0], arrived, None, None
