"""What every runtime does the same: checking inputs, and splitting prompts of any length into calls of the program."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..exporters.programs import Limits, dtype_name
from ..generation.sampling import Kind, choose
from ..model import MegalodonCache, MegalodonConfig, cache_layout, dimension_sizes


class RuntimeUnavailable(Exception):
    """A bundle's programs cannot run on this machine, or the bundle has none for the runtime."""


class Runtime(ABC):
    """Weights and programs of one model on one device.

    `all_logits`: prefill returns the logits of every token. `limits` are those of the programs; `prefill` here takes
    any length. Rows of a batch are independent and may stand at different positions.
    """

    capturable = True  # on CUDA, a step may be captured in a graph of torch's

    def __init__(
        self, config: MegalodonConfig, dtype: torch.dtype, device: torch.device, limits: Limits, all_logits: bool
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        self.limits, self.all_logits = limits, all_logits
        sizes = dimension_sizes(config)
        self._layout = [(t.name, t.shape(sizes, 1)[1:], t.torch_dtype(dtype)) for t in cache_layout(config)]

    @property
    def captures(self) -> bool:
        """Whether steps run as captured CUDA graphs."""
        return self.device.type == "cuda" and self.capturable

    @abstractmethod
    def run_prefill(self, token_ids: Tensor, lengths: Tensor, cache: MegalodonCache) -> Tensor:
        """One call of the prefill program, inside the limits."""

    @abstractmethod
    def run_decode(self, token_ids: Tensor, cache: MegalodonCache) -> Tensor:
        """One call of the decode program."""

    def run_greedy(self, token_ids: Tensor, cache: MegalodonCache, choice: Tensor) -> None:
        """`run_decode`, and into choice (2, B) the most probable tokens and the rows' faults, as `sampling.choose`.

        `token_ids` may be a row of `choice`.
        """
        torch.stack(choose(self.run_decode(token_ids, cache), Kind.GREEDY), out=choice)

    def new_cache(self, batch: int = 1) -> MegalodonCache:
        """A fresh cache for `batch` streams; ValueError beyond what the programs take."""
        self._check_batch(batch)
        return MegalodonCache.allocate(self.config, batch, self.dtype, self.device)

    def prefill(self, token_ids: Tensor, lengths: Tensor, cache: MegalodonCache) -> Tensor:
        """Feed `lengths` (B) tokens of each row of token_ids (B, L), L of any size, and update the cache in place.

        Returns float32 logits (B, V) after each row's last token, zeros for a row of length 0; with `all_logits`
        (B, L, V). ValueError for ids or lengths out of range.
        """
        return self._feed(token_ids, lengths, cache, self.run_prefill)

    def prefiller(self, cache: MegalodonCache) -> Callable[[Tensor, Tensor], Tensor]:
        """`prefill` bound to one cache. On CUDA, short calls are captured when a size comes again, and replayed."""
        if not self.captures:
            return lambda token_ids, lengths: self.prefill(token_ids, lengths, cache)
        from .cuda_graph import CapturedPrefills

        run = CapturedPrefills(self.run_prefill)
        return lambda token_ids, lengths: self._feed(token_ids, lengths, cache, run)

    def _feed(
        self,
        token_ids: Tensor,
        lengths: Tensor,
        cache: MegalodonCache,
        run: Callable[[Tensor, Tensor, MegalodonCache], Tensor],
    ) -> Tensor:
        """`prefill`, with calls of the program made by `run`."""
        self._check_cache(cache)
        token_ids = self._checked(token_ids, cache, dims=2)
        length = token_ids.shape[1]
        whole = not (lengths.is_floating_point() or lengths.dtype == torch.bool)
        if not whole or lengths.shape != (cache.batch,) or bool(((lengths < 0) | (lengths > length)).any()):
            raise ValueError(f"lengths must be (B,) = ({cache.batch},) integers in 0..{length}, got {lengths.tolist()}")
        lengths = lengths.to(self.device, torch.int64)
        pieces, last = [], torch.zeros(cache.batch, self.config.logits_size, device=self.device)
        for start in range(0, length, self.limits.max_length):
            piece = token_ids[:, start : start + self.limits.max_length]
            missing = -piece.shape[1] % self.limits.length_multiple
            valid = (lengths - start).clamp(0, piece.shape[1])
            logits = run(F.pad(piece, (0, missing)).contiguous(), valid, cache)
            if self.all_logits:
                pieces.append(logits[:, : piece.shape[1]])
            else:
                last = torch.where((valid > 0)[:, None], logits, last)
        return torch.cat(pieces, dim=1) if self.all_logits else last

    def decode(self, token_ids: Tensor, cache: MegalodonCache) -> Tensor:
        """Feed one token to each row, token_ids (B), updating the cache in place; float32 logits (B, V)."""
        self._check_cache(cache)
        return self.run_decode(self._checked(token_ids, cache, dims=1), cache)

    def decoder(self, cache: MegalodonCache) -> Callable[[Tensor], Tensor]:
        """`decode` bound to one cache. On CUDA it is captured once and replayed; its result is valid until the next."""
        self._check_cache(cache)
        if not self.captures:
            return lambda token_ids: self.run_decode(self._checked(token_ids, cache, dims=1), cache)
        from .cuda_graph import CapturedDecode

        captured = CapturedDecode(self.run_decode, cache)
        return lambda token_ids: captured(self._checked(token_ids, cache, dims=1))

    def check_range(self, low: int, high: int) -> None:
        """ValueError unless the token ids from `low` to `high` are the model's."""
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"token ids must be in 0..{self.config.vocab_size - 1}, got {low}..{high}; "
                "is this the model's tokenizer?"
            )

    def _check_batch(self, batch: int) -> None:
        if not 1 <= batch <= self.limits.max_batch:
            raise ValueError(
                f"a batch of {batch} is outside 1..{self.limits.max_batch}, which this bundle was exported for; "
                "export with a larger --max-batch, or run smaller batches"
            )

    def _check_cache(self, cache: MegalodonCache) -> None:
        """Compiled programs trust addresses: a cache unlike theirs would be read and written out of its bounds."""
        batch, tensors = cache.batch, cache.tensors()
        self._check_batch(batch)
        if len(tensors) != len(self._layout):
            raise ValueError(f"the cache has {len(tensors)} tensors, expected {len(self._layout)}; use new_cache")
        for (name, shape, dtype), tensor in zip(self._layout, tensors, strict=True):
            right = tensor.shape == (batch, *shape) and tensor.dtype == dtype and tensor.is_contiguous()
            if not right or tensor.device.type != self.device.type:
                raise ValueError(
                    f"{name} of the cache is {dtype_name(tensor.dtype)} {list(tensor.shape)} on {tensor.device}, "
                    f"strides {list(tensor.stride())}; expected {dtype_name(dtype)} {[batch, *shape]}, contiguous, "
                    f"on {self.device.type}; use new_cache"
                )

    def _checked(self, token_ids: Tensor, cache: MegalodonCache, dims: int) -> Tensor:
        shape = "(B,)" if dims == 1 else "(B, L)"
        if token_ids.dim() != dims or token_ids.shape[0] != cache.batch or not token_ids.numel():
            raise ValueError(f"token_ids must be {shape} with B = {cache.batch}, got {tuple(token_ids.shape)}")
        if token_ids.is_floating_point() or token_ids.dtype == torch.bool:
            raise ValueError(f"token_ids must be integers, got {token_ids.dtype}")
        if not token_ids.is_cuda:  # on a GPU the check would wait for it at every token
            low, high = token_ids.aminmax()
            self.check_range(int(low), int(high))
        return token_ids.to(self.device, torch.int64).contiguous()  # programs read memory, not strides
