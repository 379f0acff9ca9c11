"""The loss of a causal language model, with the arguments that transformers and its trainers pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..loss import IGNORED, cross_entropy


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORED,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss, in the dtype of logits (B, L, V): float64 stays float64.

    `labels` (B, L) are shifted here. `shift_labels` (B, L), targets that are aligned with the logits, replace them.
    """
    if shift_labels is None:
        assert labels is not None
        logits, shift_labels = logits[:, :-1], labels[:, 1:]
    return cross_entropy(logits, shift_labels, num_items_in_batch, ignore_index)
