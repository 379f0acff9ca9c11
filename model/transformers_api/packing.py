"""Packed sequences: several documents behind each other in a row, each of which is a fresh stream.

position_ids  0 1 2 0 1        seq_idx  0 0 0 1 1        cu_seq_lens_q  0 3 5

The documents of a pass are sorted by length into groups, whose lengths differ by less than twice. Each group is a batch
of its own, padded on the right, so that less than half of what is computed is padding (but for whole blocks).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import BLOCK

PACKING = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")


@dataclass(frozen=True)
class PackedLayout:
    """Where the documents of a batch (B, L) start, in the B * L columns of all rows behind each other, and how long."""

    shape: tuple[int, int]
    starts: Tensor  # (documents) int64
    counts: Tensor  # (documents) int64

    @classmethod
    def of(cls, token_ids: Tensor, packing: dict[str, Any]) -> PackedLayout | None:
        """The layout that `position_ids` and the arguments of PACKING say; None where every row is one document.

        ValueError if two of them say different things.
        """
        batch, length = token_ids.shape[:2]
        found = {name: _starts(name, value, batch, length) for name, value in packing.items() if value is not None}
        for name, starts in found.items():
            first = next(iter(found))
            if not torch.equal(starts, found[first]):
                raise ValueError(
                    f"{first} and {name} say different things about where documents start; give one of them"
                )
        if not found:
            return None
        (begins, *_) = found.values()
        starts = begins.nonzero()[:, 0]
        if len(starts) == batch:
            return None
        ends = torch.cat([starts[1:], starts.new_tensor([batch * length])])
        return cls((batch, length), starts, ends - starts)

    def map(self, x: Tensor, function: Callable[[Tensor, Tensor], Sequence[Tensor]]) -> list[Tensor]:
        """function(rows (documents, l, ...), lengths) of each group of documents of x (B, L, ...), put together again.

        `function` returns tensors (documents, l, D), and this as many of (B, L, D).
        """
        flat, columns, results = x.flatten(0, 1), [], []
        blocks = (self.counts + BLOCK - 1) // BLOCK
        sizes = torch.log2(blocks.double()).ceil()
        for size in sizes.unique():
            starts, counts = self.starts[sizes == size], self.counts[sizes == size]
            offsets = torch.arange(int(counts.max()), device=starts.device)
            valid = offsets < counts[:, None]
            index = torch.where(valid, starts[:, None] + offsets, 0)
            results.append([result[valid] for result in function(flat[index], counts)])
            columns.append(index[valid])
        order = torch.cat(columns).argsort()
        return [torch.cat(parts)[order].unflatten(0, self.shape) for parts in zip(*results, strict=True)]

    def last(self, x: Tensor, count: int) -> Tensor:
        """Each row's last `count` columns of x (B, L, ...)."""
        return x[:, max(x.shape[1] - count, 0) :]

    def counted(self, labels: Tensor, ignored: int) -> Tensor:
        """labels (B, L) with `ignored` at each document's first token, which no token of its document comes before."""
        labels = labels.clone()
        labels.view(-1)[self.starts.to(labels.device)] = ignored
        return labels

    def counted_targets(self, targets: Tensor, ignored: int) -> Tensor:
        """Targets that are aligned with the logits, as they are: whoever aligned them knew the documents."""
        return targets


def _starts(name: str, value: Tensor, batch: int, length: int) -> Tensor:
    """Whether a document starts at each of the B * L columns, from one of the arguments that say it."""
    if name.startswith("cu_seq_lens"):
        ends = value.long()
        if ends.dim() != 1 or len(ends) < 2 or int(ends[0]) != 0 or int(ends[-1]) != batch * length:
            raise ValueError(f"{name} is {ends.tolist()}, expected the documents' ends from 0 to {batch * length}")
        if not bool((ends[1:] > ends[:-1]).all()):
            raise ValueError(f"{name} is {ends.tolist()}, expected ends that grow: every document has a token")
        begins = torch.zeros(batch * length, dtype=torch.bool, device=ends.device)
        begins[ends[:-1]] = True
    else:
        if value.shape != (batch, length):
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected ({batch}, {length})")
        begins = (value == 0 if name == "position_ids" else value != value.roll(1, dims=1)).flatten()
    begins[::length] = True  # every row starts a document
    return begins
