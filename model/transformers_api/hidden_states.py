"""`output_hidden_states`: what each layer takes, in the columns of the caller."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blocking import first
from .padding import PaddingLayout


class HiddenStates:
    """An observer of a pass over `length` columns, which keeps what every layer takes.

    The layers go on from what is kept, so that gradients arrive there (`retain_grad`).
    """

    def __init__(self, layout: PaddingLayout, length: int) -> None:
        self.layout, self.length, self.kept = layout, length, list[Tensor]()

    def __call__(self, x: Tensor) -> Tensor:
        """Keep x, (B, L rounded up, D) of a prefill or (B, D) of a step; the same, from what is kept."""
        if x.dim() == 2:
            self.kept.append(x[:, None])
            return self.kept[-1][:, 0]
        kept = self.layout.back(first(x, 1, self.length))
        if self.layout.lengths is not None:
            kept = torch.where(self.layout.valid(self.length).to(x.device)[:, :, None], kept, 0.0)
        self.kept.append(kept)
        return F.pad(self.layout.to_right(kept), (0, 0, 0, x.shape[1] - self.length))
