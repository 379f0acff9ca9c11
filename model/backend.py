"""The interface between the model and its implementations.

`Megalodon` calls its `backend` for every operation that has a GPU implementation. `Backend` computes each in plain
PyTorch: it is the reference, trains, and runs on every device. Another back end is a subclass, such as `KernelBackend`
in `model/kernels/backend.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from .blocking import padding_to
from .cache import FinalCache, LayerCache
from .config import BLOCK
from .norm import NormState, TimestepNorm, accumulation_dtype, cast
from .plan import PrefillPlan
from .rotary import Rotary

if TYPE_CHECKING:
    from .blocks import MegalodonBlock
    from .modeling import Megalodon


class Backend:
    """Every operation in plain PyTorch. Caches are updated in place."""

    writes_next_tokens = False  # whether `write_next_tokens` is part of a decode step

    def prefill_sizes(self, length: int, chunk: int) -> tuple[int, int]:
        """The columns that a prefill of `length` tokens is padded to, whole blocks, and its `max_length`."""
        columns = length + padding_to(length, BLOCK)
        return columns, columns

    def begin_step(self, model: Megalodon, token_ids: Tensor, position: Tensor) -> tuple[Tensor, Rotary]:
        """What the first layer of a decode step takes: token_ids, position (B) -> x (B, D), rotary (B, dz/2)."""
        return model.embed_tokens(token_ids), model.rotary(position)

    def prefill_layer(
        self, layer: MegalodonBlock, x: Tensor, plan: PrefillPlan, rotary: Rotary, cache: LayerCache | None
    ) -> Tensor:
        """A layer over new tokens: x (B, L, D) -> (B, L, D)."""
        y: Tensor = layer(x, plan, rotary, cache)
        return y

    def step_layer(
        self, layer: MegalodonBlock, x: Tensor, position: Tensor, rotary: Rotary, cache: LayerCache
    ) -> Tensor:
        """A layer over one token of each row: x (B, D) -> (B, D)."""
        return layer.step(x, position, rotary, cache)

    def prefill_norm(self, norm: TimestepNorm, x: Tensor, plan: PrefillPlan, cache: FinalCache | None) -> Tensor:
        """The final norm over new tokens: x (B, L, D) -> (B, L, D). The caller moves the position on."""
        if cache is None:
            return norm(x, plan, norm.initial_state(x.shape[0], x.device))[0]  # type: ignore[no-any-return]
        y, state = norm(x, plan, NormState(cache.norm_mean, cache.norm_var))
        cache.store_states(*state)
        return y  # type: ignore[no-any-return]

    def step_norm(self, norm: TimestepNorm, x: Tensor, cache: FinalCache) -> Tensor:
        """The final norm over one token of each row: x (B, D) -> (B, D). The position moves on by one."""
        y, state = norm.step(x, cache.position, NormState(cache.norm_mean, cache.norm_var))
        cache.store_states(*state)
        cache.position.add_(1)
        return y

    def head(self, head: nn.Module, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) -> logits (..., V) in float32, or in float64 for a float64 model."""
        logits: Tensor = head(hidden)
        return cast(logits, accumulation_dtype(logits.dtype))

    def write_next_tokens(self, logits: Tensor, next_tokens: Tensor) -> None:
        """Write the most probable tokens of logits (B, V), and what is wrong with them, into next_tokens (2, B)."""
        raise NotImplementedError("this back end leaves the choice of tokens to the caller")
