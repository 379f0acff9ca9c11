"""What the layers of one prefill share: index arithmetic over tokens, the ring cache and the EMA's blocks.

A prefill feeds `lengths[b]` tokens of each row b of token_ids (B, L), and row b's stream is at `position[b]`.
Everything here follows from these numbers alone, so it is computed once and read by every layer.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from .blocking import padding_to
from .config import BLOCK

MAX_SUMMED = 1024  # blocks of tokens that one triangular product sums: 8 MB of ones
SEGMENT = 64  # tokens per segment where the EMA is scanned in time
NEVER = 2**30  # the time of a slot that no query sees: it is empty, or holds a token of an earlier chunk


class _Plan:
    """A dataclass of tensors and other plans, which moves to another device as one."""

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """The same on another device, for models whose layers are spread over several."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        for name, value in moved.items():
            if isinstance(value, Tensor | _Plan):
                moved[name] = value.to(device, non_blocking=non_blocking)
        return type(self)(**moved)


@dataclass
class TokenPlan(_Plan):
    """Which columns are tokens, and how many tokens each stream has seen.

    Example: L = 4, a row with lengths 3 at position 10.

        valid         1  1  1  0    the last column is padding
        seen         11 12 13 13    tokens of the stream up to and including each column
        seen_before  10             tokens before this call
    """

    lengths: Tensor  # (B) int64
    position: Tensor  # (B) int64
    valid: Tensor  # (B, L, 1) bool
    has_tokens: Tensor  # (B, 1) bool: the row has a valid token
    seen_before: Tensor  # (B, 1, 1) float64: `position`
    seen: Tensor  # (B, L, 1) float64, at least 1
    upper_ones: Tensor  # (S, S) float64: see `upper_triangle`; S is the number of blocks, from 2T to MAX_SUMMED
    # (B): 0, 1, 2 ... After the other fields: where torch.export meets this tensor before `valid`, it loses sight of L
    # being a multiple of BLOCK, and pads and cuts at every layer (`tests/exporters/test_limits.py` would fail).
    rows: Tensor

    @classmethod
    def of(cls, lengths: Tensor, position: Tensor, length: int, max_length: int) -> TokenPlan:
        """Plan L = `length` columns, of which there are at most `max_length`."""
        ends = torch.arange(1, length + 1, device=lengths.device)
        return cls(
            lengths=lengths,
            position=position,
            valid=(ends <= lengths[:, None])[:, :, None],
            has_tokens=lengths[:, None] > 0,
            seen_before=position[:, None, None].double(),
            seen=(position[:, None] + torch.minimum(ends, lengths[:, None]))[:, :, None].clamp(min=1).double(),
            upper_ones=upper_triangle(lengths.device, min(-(-max_length // BLOCK), MAX_SUMMED)),
            rows=torch.arange(lengths.shape[0], device=lengths.device),
        )


@dataclass
class RingPlan(_Plan):
    """Which keys a query sees, and which slots of the rings take the new keys and values.

    Times count from the first new token: a new token's time is its index, a slot's time is that of the token it holds.
    A query sees keys from the start of its chunk up to itself. Example: C = 4, position 6, 3 new tokens.

        slot_time     -2 -1 NEVER NEVER   slots 0 and 1 hold tokens 4 and 5; 2 and 3 hold tokens of the last chunk
        time           0  1  2            the new tokens 6, 7 and 8
        chunk_start   -2 -2  2            tokens 6 and 7 see from token 4 on; token 8 begins a chunk
    """

    single: bool  # a call has at most C tokens, which attention takes as one block; otherwise as blocks of C
    time: Tensor  # (L) int32: 0, 1, 2 ...; unless `single` in whole chunks, (chunks, C)
    chunk_start: Tensor  # (B, L) or (B, chunks, C) int32: the time of the first token of each chunk
    slot_time: Tensor  # (B, R) int32: of the first R slots, which hold all that is visible; R <= C
    # The rings take a row's last `size` new tokens, where size is L if `single`, else C.
    index: Tensor  # (B, size): which new tokens the rings take
    slots: Tensor  # (B, size): the slot of each, all distinct
    taken: Tensor  # (B, size, 1, 1) bool: whether it is a real token; otherwise its slot keeps what it holds

    @classmethod
    def of(cls, lengths: Tensor, position: Tensor, length: int, ring: int, single: bool, cached: bool) -> RingPlan:
        """Plan L = `length` columns over rings of `ring` slots; `cached`: the call goes on from a cache."""
        device = lengths.device
        offset = (position % ring).int()[:, None]  # valid slots
        time = torch.arange(length + (0 if single else padding_to(length, ring)), dtype=torch.int32, device=device)
        chunk_start = (offset + time) // ring * ring - offset
        if not single:
            time, chunk_start = (t.unflatten(-1, (time.shape[0] // ring, ring)) for t in (time, chunk_start))
        slots = torch.arange(
            _slots_to_read(offset, ring) if single and cached else ring, dtype=torch.int32, device=device
        )
        size = length if single else ring
        index = (lengths[:, None] - size).clamp(min=0) + torch.arange(size, device=device)
        return cls(
            single=single,
            time=time,
            chunk_start=chunk_start,
            slot_time=torch.where(slots < offset, slots - offset, NEVER),
            index=index,
            slots=(position[:, None] + index) % ring,
            taken=(index < lengths[:, None])[:, :, None, None],
        )


@dataclass
class EMAPlan(_Plan):
    """Where rows end in the blocks of T = 32 tokens that the EMA works on, and the powers of q that it needs.

    Example: a row of 70 tokens.

        last_block   2          tokens 64..69 are in block 2
        last_count   6          valid tokens of that block: 64..69
        tail_index   38 ... 69  the 32 tokens that end at the last one; the last 6 of them are in block 2
    """

    last_block: Tensor  # (B)
    last_count: Tensor  # (B): 0..T
    tail_index: Tensor  # (B, T)
    tail_valid: Tensor  # (B, T, 1) bool
    exponents: Tensor  # (T + 1 + shifts, 1): 0..T, and T times each of `carry_shifts`
    upper: Tensor  # (T, T) bool: column >= row
    lag: Tensor  # (T, T): column - row, at least 0

    @classmethod
    def of(cls, lengths: Tensor, max_length: int) -> EMAPlan:
        """Plan a call of at most `max_length` columns."""
        device = lengths.device
        last = (lengths - 1).clamp(min=0) // BLOCK
        rest = lengths - last * BLOCK
        block = torch.arange(BLOCK, device=device)
        offsets = block - BLOCK
        carries = [torch.full((1,), BLOCK * shift, device=device) for shift in carry_shifts(max_length)]
        return cls(
            last_block=last,
            last_count=rest,
            tail_index=(lengths[:, None] + offsets).clamp(min=0),
            tail_valid=(rest[:, None] + offsets >= 0)[:, :, None],
            exponents=torch.cat([torch.arange(BLOCK + 1, device=device), *carries])[:, None],
            upper=block >= block[:, None],
            lag=(block - block[:, None]).clamp(min=0),
        )


@dataclass
class PrefillPlan(_Plan):
    """The plans of one prefill; `max_length` is the static bound of L that decides the form of a traced graph."""

    max_length: int
    tokens: TokenPlan
    ring: RingPlan
    ema: EMAPlan

    @classmethod
    def of(
        cls, lengths: Tensor, position: Tensor, length: int, ring: int, max_length: int, cached: bool
    ) -> PrefillPlan:
        """Plan a prefill of `lengths` (B) tokens in L = `length` columns, from `position` (B).

        `ring` is the number of slots of the ring caches, a chunk's unless attention has a window of its own. `cached`
        says whether the call goes on from a cache; otherwise every position is 0.
        """
        return cls(
            max_length=max_length,
            tokens=TokenPlan.of(lengths, position, length, max_length),
            ring=RingPlan.of(lengths, position, length, ring, max_length <= ring, cached),
            ema=EMAPlan.of(lengths, max_length),
        )


def upper_triangle(device: torch.device, size: int = 0) -> Tensor:
    """Ones on and above the diagonal, float64, at least two blocks of columns: x times it are prefix sums.

    A call whose blocks fit into `size` columns has two levels of sums. A third level costs a compiler much: its sizes
    are remainders of remainders.
    """
    columns = torch.arange(max(size, 2 * BLOCK), device=device)
    return (columns >= columns[:, None]).double()


def carry_shifts(max_length: int) -> list[int]:
    """1, 2, 4 ... below the number of blocks of a length: the steps of the prefix sum over blocks."""
    shifts = [1]
    while shifts[-1] * 2 * BLOCK < max_length:
        shifts.append(shifts[-1] * 2)
    return shifts if max_length > BLOCK else []


def _slots_to_read(offset: Tensor, ring: int) -> int:
    """The slots that the fullest row has filled, in whole blocks and at least one.

    The whole ring on a GPU, where the host would wait for that number, and in torch.compile, where it breaks the graph.
    """
    if ring <= BLOCK or offset.device.type != "cpu" or torch.compiler.is_dynamo_compiling():
        return ring
    filled = (offset.max() + BLOCK - 1) // BLOCK * BLOCK
    count: int = filled.clamp(min=BLOCK, max=ring).item()  # type: ignore[assignment]
    torch._check(count >= BLOCK)
    torch._check(count <= ring)
    return count
