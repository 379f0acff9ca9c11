"""What the layers of one prefill share: which steps are valid, who attends to whom, where new keys go."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .blocking import padding_to

BLOCK = 32  # tokens per block of the EMA and of prefix sums
SEGMENT = 64  # tokens per segment of the EMA's scan on a GPU (`kernels/prefill/ema.py`)
NEVER = 2**30  # the time of a slot without a token: after every query


@dataclass
class PrefillPlan:
    """Index arithmetic of a prefill of `lengths` (B) tokens from `position` (B), L columns, once for all layers.

    `max_length` >= L is the static bound that decides the form of the graph: up to a chunk (`single`) attention takes
    the new tokens as one block, beyond it as blocks of C. A query sees the keys from the start of its chunk
    up to itself, in times (int32): a new token's is its index, a slot's the index that its token would have.
    """

    lengths: Tensor
    position: Tensor
    max_length: int
    single: bool
    valid: Tensor  # (B, L, 1): a real token, not padding
    started: Tensor  # (B, 1): the row has a valid token
    count: Tensor  # (B, 1, 1) float64: `position`
    seen: Tensor  # (B, L, 1) float64: tokens of the stream up to and including each step, at least 1
    time: Tensor  # (L): of the new tokens (beyond a chunk, L in whole chunks),
    chunk_start: Tensor  # (B, L): of the first token of their chunks,
    ring_time: Tensor  # (B, R): and of the first R slots of the ring, which hold all that is visible
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
        offset = (position % chunk).int()[:, None]  # valid slots of the ring
        time = torch.arange(length + (0 if single else padding_to(length, chunk)), dtype=torch.int32, device=device)
        slots = torch.arange(
            _slots_to_read(offset, chunk) if single and cached else chunk, dtype=torch.int32, device=device
        )
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
            time=time,
            chunk_start=(offset + time) // chunk * chunk - offset,
            ring_time=torch.where(slots < offset, slots - offset, NEVER),
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

    def to(self, device: torch.device, non_blocking: bool = False) -> PrefillPlan:
        """The same on another device: accelerate calls it where a model's layers are spread over several."""
        if self.lengths.device == torch.device(device):
            return self
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: t.to(device, non_blocking=non_blocking) if isinstance(t, Tensor) else t for k, t in moved.items()}
        return PrefillPlan(**moved)


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


def _slots_to_read(offset: Tensor, chunk: int) -> int:
    """Of every row's ring, the slots that the fullest is filled to, in whole blocks and at least one.

    The whole ring where that number would be waited for, on a GPU, or break a graph, in torch.compile.
    """
    if chunk <= BLOCK or offset.device.type != "cpu" or torch.compiler.is_dynamo_compiling():
        return chunk
    filled = (offset.max() + BLOCK - 1) // BLOCK * BLOCK
    count: int = filled.clamp(min=BLOCK, max=chunk).item()  # type: ignore[assignment]
    torch._check(count >= BLOCK)
    torch._check(count <= chunk)
    return count
