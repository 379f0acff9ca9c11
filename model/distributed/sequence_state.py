"""States that travel from process to process inside one forward pass, and their gradients back: see `parallel_loss`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Relay:
    """What one forward pass hands on, layer by layer, from the process with the piece before to the one after."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._received: dict[nn.Module, Tensor] = {}  # so that a recomputed layer (checkpointing) does not ask again
        self._sent: set[nn.Module] = set()

    def receive(self, place: nn.Module, states: Sequence[Tensor], x: Tensor, *modules: nn.Module) -> Sequence[Tensor]:
        """The states (B, ...) that the process before sends from the same place; the first one's are `states`.

        `x` goes with them through `modules`: if anything of these takes gradients, so do the states, in both processes.
        """
        if self.rank == 0:
            return states
        tracked = x.requires_grad or any(p.requires_grad for module in modules for p in module.parameters())
        flat = torch.cat([state.flatten(1) for state in states], dim=1).detach().requires_grad_(tracked)
        packed = _Receive.apply(flat, self, place)
        pieces = packed.split([state[0].numel() for state in states], dim=1)
        return [piece.view_as(state) for piece, state in zip(pieces, states, strict=True)]

    def send(self, place: nn.Module, x: Tensor, states: Sequence[Tensor]) -> Tensor:
        """Send states to the process after; returns x, through which their gradients come back."""
        if self.rank == self.size - 1:
            return x
        packed = torch.cat([state.flatten(1) for state in states], dim=1)
        return _Send.apply(x, packed, self, place)

    def received(self, place: nn.Module, like: Tensor) -> Tensor:
        """What arrived for a place; waits for it the first time."""
        if place not in self._received:
            self._received[place] = torch.empty_like(like)
            dist.recv(self._received[place], group=self.group, group_src=self.rank - 1)
        return self._received[place]

    def send_once(self, place: nn.Module, packed: Tensor) -> None:
        """Send, unless that has been done for this place."""
        if place not in self._sent:
            self._sent.add(place)
            dist.send(packed.contiguous(), group=self.group, group_dst=self.rank + 1)


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, like: Tensor, relay: Relay, place: nn.Module) -> Tensor:
        ctx.relay = relay
        return relay.received(place, like).clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        relay: Relay = ctx.relay
        dist.send(gradients[0].contiguous(), group=relay.group, group_dst=relay.rank - 1)
        return gradients[0], None, None


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, relay: Relay, place: nn.Module) -> Tensor:
        ctx.relay, ctx.like = relay, torch.empty_like(packed, device="meta")
        relay.send_once(place, packed)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        relay: Relay = ctx.relay
        arrived = torch.empty_like(ctx.like, device=gradients[0].device)
        dist.recv(arrived, group=relay.group, group_src=relay.rank + 1)
        return gradients[0], arrived, None, None
