"""What the layers of one prefill share: which steps are valid, who attends to whom, where new keys go."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .blocking import padding_to

BLOCK = 32  # tokens per block of the EMA and of prefix sums
SEGMENT = 64  # tokens per segment of the EMA's scan on a GPU (`kernels/scan.py`)


@dataclass
class PrefillPlan:
    """Index arithmetic of a prefill of `lengths` (B) tokens from `position` (B), L columns, once for all layers.

    `max_length` >= L is the static bound that decides the form of the graph: up to a chunk (`single`) attention takes
    the new tokens as one block, beyond it as blocks of C.
    """

    lengths: Tensor
    position: Tensor
    max_length: int
    single: bool
    valid: Tensor  # (B, L, 1): a real token, not padding
    started: Tensor  # (B, 1): the row has a valid token
    count: Tensor  # (B, 1, 1) float64: `position`
    seen: Tensor  # (B, L, 1) float64: tokens of the stream up to and including each step, at least 1
    allowed: Tensor  # keys a query may attend to, over (B, H, blocks, size, keys)
    ring_index: Tensor  # (B, size): which new tokens the rings take,
    ring_slots: Tensor  # (B, size): where they go (distinct slots),
    ring_valid: Tensor  # (B, size, 1, 1): and whether they are real
    last_block: Tensor  # (B): the EMA block that a row ends in,
    last_steps: Tensor  # (B): its valid tokens, 0..T,
    tail_index: Tensor  # (B, T): and the T tokens that end at `lengths`,
    tail_valid: Tensor  # (B, T, 1): of which these are in that block
    rows: Tensor  # (B): 0, 1, 2 ...
    exponents: Tensor  # (T + 1 + shifts, 1): 0..T, and T times each of `carry_shifts`: the EMA's powers of q
    upper: Tensor  # (T, T) bool: column >= row,
    lag: Tensor  # (T, T): and column - row, at least 0
    upper_ones: Tensor  # (S, S) float64: see `upper_triangle`

    @classmethod
    def of(
        cls, lengths: Tensor, position: Tensor, length: int, chunk: int, max_length: int, cached: bool
    ) -> PrefillPlan:
        """Plan a prefill; `cached`: it goes on from a cache, otherwise every position is 0."""
        device = lengths.device
        single = max_length <= chunk
        steps = torch.arange(1, length + 1, device=device)
        size = length if single else chunk
        ring_index = (lengths[:, None] - size).clamp(min=0) + torch.arange(size, device=device)
        last = (lengths - 1).clamp(min=0) // BLOCK
        rest = lengths - last * BLOCK
        block = torch.arange(BLOCK, device=device)
        offsets = block - BLOCK
        upper = block >= block[:, None]
        carries = [torch.full((1,), BLOCK * shift, device=device) for shift in carry_shifts(max_length)]
        return cls(
            lengths=lengths,
            position=position,
            max_length=max_length,
            single=single,
            valid=(steps <= lengths[:, None])[:, :, None],
            started=lengths[:, None] > 0,
            count=position[:, None, None].double(),
            seen=(position[:, None] + torch.minimum(steps, lengths[:, None]))[:, :, None].clamp(min=1).double(),
            allowed=_after_ring(position, length, chunk, single) if cached else _causal(size, device),
            ring_index=ring_index,
            ring_slots=(position[:, None] + ring_index) % chunk,
            ring_valid=(ring_index < lengths[:, None])[:, :, None, None],
            last_block=last,
            last_steps=rest,
            tail_index=(lengths[:, None] + offsets).clamp(min=0),
            tail_valid=(rest[:, None] + offsets >= 0)[:, :, None],
            rows=torch.arange(lengths.shape[0], device=device),
            exponents=torch.cat([torch.arange(BLOCK + 1, device=device), *carries])[:, None],
            upper=upper,
            lag=(block - block[:, None]).clamp(min=0),
            upper_ones=upper_triangle(device),
        )


def upper_triangle(device: torch.device) -> Tensor:
    """Ones on and above the diagonal, (S, S) float64: x times it are prefix sums of up to S steps.

    S is two blocks, so that a call of up to 2,048 tokens has two levels of sums, no third of a block or two: that would
    be a size of one in a traced graph, which compilers take for a constant.
    """
    steps = torch.arange(2 * BLOCK, device=device)
    return (steps >= steps[:, None]).double()


def carry_shifts(max_length: int) -> list[int]:
    """1, 2, 4 ... below the number of blocks of a length: the steps of the prefix sum over blocks."""
    shifts = [1]
    while shifts[-1] * 2 * BLOCK < max_length:
        shifts.append(shifts[-1] * 2)
    return shifts if max_length > BLOCK else []


def _causal(size: int, device: torch.device) -> Tensor:
    steps = torch.arange(size, device=device)
    return steps <= steps[:, None]


def _after_ring(position: Tensor, length: int, chunk: int, single: bool) -> Tensor:
    """(B, 1, blocks, size, C + size): each block of queries over the C keys before it and its own.

    Before the first block that is the ring, in slots; a chunk never reaches further back.
    """
    device = position.device
    size, count = (length, 1) if single else (chunk, (length + padding_to(length, chunk)) // chunk)
    offset = (position % chunk)[:, None, None, None]  # valid slots of the ring
    block = torch.arange(count, device=device)[:, None, None]
    key = torch.arange(chunk + size, device=device)
    query = block * size + torch.arange(size, device=device)[:, None]  # index among the new tokens
    new_key = (block - 1) * chunk + key  # likewise, unless the key is a slot of the ring
    in_ring = (block == 0) & (key < chunk)
    chunk_start = (offset + query) // chunk * chunk - offset  # of the query's chunk; up to 0: it reaches into the ring
    allowed = torch.where(in_ring, (key < offset) & (chunk_start <= 0), (new_key <= query) & (new_key >= chunk_start))
    return allowed[:, None]
