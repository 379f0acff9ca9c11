"""Padding anywhere in a batch's rows, moved to the right, where the model expects it.

attention_mask   0 0 1 1 1        lengths  3        place  3 4 0 1 2        order  2 3 4 0 1
                 1 0 1 1 0                 3               0 3 1 2 4               0 2 3 1 4
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PaddingLayout:
    """Where the tokens are: row b has `lengths[b]` of them, in L columns.

    With its padding on the right, column `order[b, j]` is the row's column j, and column j goes to `place[b, j]`.
    `lengths` is None where every column is a token, and `order` and `place` where the padding is on the right.
    """

    lengths: Tensor | None = None
    order: Tensor | None = None
    place: Tensor | None = None

    @classmethod
    def of(cls, token_ids: Tensor, attention_mask: Tensor | None, lengths: Tensor | None) -> PaddingLayout:
        """The layout of token_ids (B, L), from `lengths` or from a mask that is nonzero for tokens.

        A mask may have the columns of earlier calls in front. ValueError for a mask of another shape.
        """
        if attention_mask is None:
            return cls(lengths)
        if lengths is not None:
            raise ValueError("attention_mask and lengths both say where the padding is; give one of them")
        batch, length = token_ids.shape[:2]
        if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, expected ({batch}, {length}) or with the "
                "columns before these in front: 1 for a token, 0 for padding"
            )
        mask = attention_mask[:, attention_mask.shape[1] - length :] != 0
        return cls() if not torch.compiler.is_compiling() and bool(mask.all()) else cls.from_valid(mask)

    @classmethod
    def from_valid(cls, valid: Tensor) -> PaddingLayout:
        """The layout of columns (B, L) of which some are tokens."""
        lengths, before = valid.sum(1), valid.cumsum(1)
        columns = torch.arange(valid.shape[1], device=valid.device)
        # Tokens go behind the tokens before them, and padding behind all tokens and the padding before it.
        place = torch.where(valid, before - 1, lengths[:, None] + columns - before)
        return cls(lengths, torch.zeros_like(place).scatter(1, place, columns.expand_as(place)), place)

    def valid(self, length: int) -> Tensor:
        """Which of `length` columns are tokens, (B, L) bool; not for a layout without padding."""
        assert self.lengths is not None
        place = torch.arange(length, device=self.lengths.device) if self.place is None else self.place
        return place < self.lengths[:, None]

    def without_last(self, count: int, length: int) -> PaddingLayout | None:
        """The layout of all but the last `count` of `length` columns; None if there is padding among those."""
        if self.lengths is None:
            return self
        valid = self.valid(length)
        return PaddingLayout.from_valid(valid[:, :-count]) if bool(valid[:, -count:].all()) else None

    def to_right(self, x: Tensor) -> Tensor:
        """x (B, L, ...) with each row's padding moved behind its tokens."""
        return x if self.order is None else _columns(x, self.order)

    def back(self, x: Tensor) -> Tensor:
        """Undo `to_right`."""
        return x if self.place is None else _columns(x, self.place)

    def last(self, x: Tensor, count: int) -> Tensor:
        """Each row's last `count` tokens of x (B, L, ...); 0 where a row has fewer."""
        if self.lengths is None:
            return x[:, max(x.shape[1] - count, 0) :]
        index = self.lengths[:, None] + torch.arange(-min(count, x.shape[1]), 0, device=self.lengths.device)
        columns = index.clamp(min=0)
        found = _columns(x, columns if self.order is None else self.order.gather(1, columns))
        return torch.where((index >= 0).to(x.device)[:, :, None], found, 0.0)

    def counted(self, labels: Tensor, ignored: int) -> Tensor:
        """labels (B, L) with `ignored` where the token or the one before it is padding: no step has them as target."""
        if self.lengths is None:
            return labels
        valid = self.valid(labels.shape[1]).to(labels.device)
        after = torch.nn.functional.pad(valid, (1, -1))  # whether the column before is a token
        return torch.where(valid & after, labels, ignored)

    def counted_targets(self, targets: Tensor, ignored: int) -> Tensor:
        """Targets that are aligned with the logits (B, L), with `ignored` where the token is padding."""
        if self.lengths is None:
            return targets
        return torch.where(self.valid(targets.shape[1]).to(targets.device), targets, ignored)


def _columns(x: Tensor, index: Tensor) -> Tensor:
    """The columns `index` (B, L') of x (B, L, ...), which may be on another device: (B, L', ...)."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index.to(x.device)]
