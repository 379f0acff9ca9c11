"""Padding on either side of a batch's rows, moved to the right, where the model expects it.

attention_mask   0 0 1 1 1        lengths  3 5
                 1 1 1 1 1        first    2 0
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PaddingLayout:
    """Where the tokens are: row b has `lengths[b]` of them, in L columns, from column `first[b]` on.

    `lengths` is None where every column is a token, and `first` where every row starts at column 0.
    """

    lengths: Tensor | None = None
    first: Tensor | None = None

    @classmethod
    def of(cls, token_ids: Tensor, attention_mask: Tensor | None, lengths: Tensor | None) -> PaddingLayout:
        """The layout of token_ids (B, L), from `lengths` or from a mask that is nonzero for tokens.

        A mask may have the columns of earlier calls in front. ValueError for a mask of another shape, or with padding
        between two tokens. torch.compile cannot look at values: there a row's tokens are as many as its mask has, from
        the first one on.
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
        looking = not torch.compiler.is_compiling()
        if looking and bool(mask.all()):
            return cls()
        layout = cls(mask.sum(1), mask.int().argmax(1))
        if looking and not torch.equal(mask, layout.valid(length)):
            row = int((mask != layout.valid(length)).any(1).int().argmax())
            raise ValueError(
                f"attention_mask has padding between two tokens of row {row}, where a stream has no gap; put the "
                "padding on the left or the right of each row, or carry the stream over in past_key_values"
            )
        return layout

    def valid(self, length: int) -> Tensor:
        """Which of `length` columns are tokens, (B, L) bool; not for a layout without padding."""
        assert self.lengths is not None
        columns = torch.arange(length, device=self.lengths.device)
        columns = columns if self.first is None else columns - self.first[:, None]
        return (columns >= 0) & (columns < self.lengths[:, None])

    def without_last(self, count: int, length: int) -> PaddingLayout | None:
        """The layout of all but the last `count` of `length` columns; None if there is padding among those."""
        if self.lengths is None:
            return self
        if not bool(self.valid(length)[:, -count:].all()):
            return None
        return PaddingLayout(self.lengths - count, self.first)

    def to_right(self, x: Tensor) -> Tensor:
        """x (B, L, ...) with each row's padding moved behind its tokens."""
        return x if self.first is None else _rolled(x, self.first)

    def back(self, x: Tensor) -> Tensor:
        """Undo `to_right`."""
        return x if self.first is None else _rolled(x, -self.first)

    def last(self, x: Tensor, count: int) -> Tensor:
        """Each row's last `count` tokens of x (B, L, ...); 0 where a row has fewer."""
        if self.lengths is None:
            return x[:, max(x.shape[1] - count, 0) :]
        index = self.lengths.to(x.device)[:, None] + torch.arange(-min(count, x.shape[1]), 0, device=x.device)
        columns = index.clamp(min=0) if self.first is None else index.clamp(min=0) + self.first.to(x.device)[:, None]
        rows = torch.arange(x.shape[0], device=x.device)[:, None]
        return torch.where((index >= 0)[:, :, None], x[rows, columns.clamp(max=x.shape[1] - 1)], 0.0)

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


def _rolled(x: Tensor, shift: Tensor) -> Tensor:
    """x (B, L, ...) with column j of each row taken from column (j + shift) mod L, |shift| < L.

    The two may be on different devices, where a model is spread over several.
    """
    length = x.shape[1]
    index = torch.arange(length, device=x.device) + shift.to(x.device)[:, None]
    index = torch.where(index < 0, index + length, index)  # ONNX exports cannot take % with a symbolic size
    index = torch.where(index >= length, index - length, index)
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]
