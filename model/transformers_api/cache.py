"""The model's cache as a transformers Cache: its length in columns, beams, and tokens that are taken back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Self

import torch
from torch import Tensor
from transformers import Cache

from ..cache import FinalCache, LayerCache, ModelCache
from ..config import ModelConfig
from .padding import PaddingLayout

Feed = Callable[[Tensor, Tensor], object]  # takes token_ids (B, L) and lengths (B), and updates the cache


class MegalodonCache(ModelCache, Cache):  # type: ignore[misc]  # both have `layers`, of other types
    """`ModelCache` with the methods that transformers' generate() calls.

    transformers counts columns of a padded batch, where the cache counts each row's tokens; `padding` is the number of
    columns that the longest row has not filled. A recurrent state cannot be cropped. Where tokens will have to be taken
    back (assisted generation), `activate_past_recording` keeps a copy of the state and the tokens fed since, and `crop`
    goes back to the copy and feeds the tokens that stay.
    """

    is_compileable = False  # otherwise generate() prepares masks for attention over all positions
    layer_class_to_replicate = None
    offloading = False
    record_past = False
    padding: Tensor  # () int64, from the start: an exported graph takes it and returns it, like the other tensors
    _before: list[Tensor] | None = None  # the state at the last `crop`
    _columns: int  # the columns seen until then
    _fed: list[tuple[Tensor, Tensor]]  # the columns fed since, (B, L), and which of them are tokens
    _feed: Feed

    def __init__(self, layers: list[LayerCache], final: FinalCache) -> None:
        super().__init__(layers, final)
        self.padding = final.position.new_zeros(())

    def clone(self, config: ModelConfig) -> Self:
        """An independent copy."""
        return self._with_padding(super().clone(config))

    def reset(self) -> None:
        """Make every row a fresh stream, in place."""
        super().reset()
        self.padding = torch.zeros_like(self.padding)
        self.forget()

    def copy_(self, other: ModelCache) -> None:
        """Take over the contents of another cache of the same shapes, in place."""
        super().copy_(other)
        self.padding = getattr(other, "padding", torch.zeros_like(self.padding))
        self.forget()

    def rows(self, config: ModelConfig, index: Tensor) -> Self:
        """A new cache of the chosen rows, (B') int64, in that order: it forks streams, or reorders beams."""
        return self._with_padding(super().rows(config, index))

    def _with_padding(self, other: Self) -> Self:
        other.padding = self.padding
        return other

    # ---- for forward -----------------------------------------------------------------------------------------------

    def fix_sizes(self) -> None:
        """Make every size but the batch a constant of the graph that torch.export traces, as they are of the model."""
        for tensor in self.tensors():
            tuple(map(int, tensor.shape[1:]))

    def check_batch(self, batch: int) -> None:
        """ValueError unless it has as many rows as the tokens that are fed."""
        if batch != self.position.shape[0]:
            raise ValueError(
                f"past_key_values has {self.position.shape[0]} rows and input_ids {batch}; give each row its stream's "
                "cache (rows or batch_repeat_interleave choose them)"
            )

    def record(self, token_ids: Tensor, valid: Tensor | None, feed: Feed) -> None:
        """Note columns that are about to be fed through `feed`, if they may be taken back.

        `valid` (B, L) says which of token_ids (B, L) are tokens; None says all.
        """
        if not self.record_past:
            return
        if token_ids.is_floating_point():
            raise ValueError(
                "tokens given as inputs_embeds cannot be taken back; give input_ids to assisted generation"
            )
        if self._before is None:
            self._before, self._columns = [t.clone() for t in self.tensors()], self.get_seq_length()
            self._fed, self._feed = [], feed
        self._fed.append((token_ids, torch.ones_like(token_ids, dtype=torch.bool) if valid is None else valid))

    def forget(self) -> None:
        """Keep what was fed so far for good."""
        self._before = None

    def count_padding(self, columns: int, before: Tensor) -> None:
        """After a padded call over `columns`, with the positions before it."""
        self.padding = self.padding + columns - (self.position.max() - before.max())

    # ---- for transformers ------------------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding included: the tokens of the longest row where nothing was padded."""
        return int(self.position.max() + self.padding)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: a stream has no end."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """All columns, from the first: the masks that transformers makes are over these."""
        return self.get_seq_length() + query_length, 0

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.position.shape[0]

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can take tokens back."""
        return self.record_past

    def activate_past_recording(self) -> None:
        """From now on tokens may be taken back, to the last `crop`."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -tokens_to_remove columns, at most those fed since the last crop; 0 keeps them all."""
        if not self.record_past:
            raise ValueError(
                "a Megalodon cache is a running state and cannot be cropped; call activate_past_recording before the "
                "tokens are fed, or keep a clone"
            )
        count = abs(tokens_to_remove)
        if count and self._before is None:
            raise ValueError(f"{count} tokens cannot be taken back: none were fed since the last crop")
        if count and self._before is not None:
            fed, valid = (torch.cat(parts, dim=1) for parts in zip(*self._fed, strict=True))
            kept = fed.shape[1] - count
            if kept < 0:
                raise ValueError(f"{count} tokens cannot be taken back, only the last {fed.shape[1]}")
            self.replace(self._before)
            if kept:
                layout = PaddingLayout.from_valid(valid[:, :kept])
                self._feed(layout.to_right(fed[:, :kept]), valid[:, :kept].sum(1))
            self.padding = self._columns + kept - self.position.max()
        self.forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue the chosen rows, (B) int64, as beam search does."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the chosen rows, (B') int64, in that order."""
        self.replace([t.index_select(0, indices.to(t.device)) for t in self.tensors()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self.replace([t.repeat_interleave(repeats, dim=0) for t in self.tensors()])

    def update(self, *_: Any, **__: Any) -> NoReturn:
        """Not part of this cache: the model updates its tensors in place."""
        raise NotImplementedError("a Megalodon cache takes no keys and values from outside; feed tokens to the model")
