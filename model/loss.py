"""The training loss.

loss = - mean over t of log softmax(logits_t)[target_t]
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the target of a step that does not count, as everywhere in transformers


def cross_entropy(logits: Tensor, targets: Tensor, items: Tensor | int | None = None, ignored: int = IGNORED) -> Tensor:
    """Cross entropy in nats of logits (B, L, V) and targets (B, L).

    The mean over the targets that count; with `items`, their sum over that number. `items` is how many count in all
    where these are a part of an accumulated batch, or of a sequence in pieces. Targets may be on another device.
    """
    reduction = "mean" if items is None else "sum"
    targets = targets.flatten().to(logits.device)
    loss = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=ignored, reduction=reduction)
    if items is None:
        return loss
    return loss / (items.to(loss.device) if isinstance(items, Tensor) else items)
