"""The programs of a runtime bound to one cache: all that sessions, the decode loop and `verify` run.

    programs = runtime.bind(runtime.new_cache(batch=2))
    logits = programs.prefill(token_ids, lengths)  # (B, V), after each row's last token
    logits = programs.decode(logits.argmax(-1))  # (B, V)

Binding checks the cache once. Its tensors must then stay where they are: compiled programs and captured CUDA graphs
hold their addresses. On a GPU, programs are captured in CUDA graphs here and replayed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..generation.arguments import check_ids
from ..generation.sampling import SamplerKind, choose
from ..model import ModelCache
from .ambient import in_plain_modes
from .cuda_graph import CapturedDecode, CapturedPrefills, CapturedStep

if TYPE_CHECKING:
    from .base import Runtime

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class BoundPrograms(ABC):
    """The programs of one model over one cache of B rows; every call updates the cache in place.

    Rows are independent and may be at different positions. A subclass runs one call of a program, in `run_prefill`,
    `run_score` and `run_decode`, whose arguments are checked and inside the limits.
    """

    def __init__(self, runtime: Runtime, cache: ModelCache, capture: bool) -> None:
        """`capture`: run as CUDA graphs of torch's."""
        self.runtime, self.cache, self.captures = runtime, cache, capture
        self._prefills = CapturedPrefills()
        self._decode_graph: CapturedDecode | None = None

    @abstractmethod
    def run_prefill(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """One call of the prefill program; logits (B, V) after each row's last token, anything for a row without."""

    @abstractmethod
    def run_score(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """One call of the prefill program; logits (B, L, V) after every token. Called only where `can_score`."""

    @abstractmethod
    def run_decode(self, token_ids: Tensor) -> Tensor:
        """One call of the decode program; logits (B, V)."""

    def run_greedy(self, token_ids: Tensor, next_tokens: Tensor) -> None:
        """One call of the decode program that writes (2, B): the most probable tokens, and the rows' logit errors.

        `token_ids` may be a row of `next_tokens`.
        """
        torch.stack(choose(self.run_decode(token_ids), SamplerKind.GREEDY), out=next_tokens)

    @in_plain_modes
    def prefill(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """Feed the first `lengths` (B) tokens of each row of token_ids (B, L); L may be of any size.

        Returns float32 logits (B, V) after each row's last token, zeros for a row of length 0. ValueError for ids or
        lengths out of range; the cache is then as it was. Checking ids that are on a GPU waits for it.
        """
        return self.feed(*self._checked_prompt(token_ids, lengths))

    @in_plain_modes
    def score(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """As `prefill`, but returns float32 logits (B, L, V) after every token; those after a row's last are undefined.

        ValueError if the bundle was exported without `--all-logits`: its prefill program gives the last logits alone.
        """
        if not self.runtime.can_score:
            raise ValueError(
                "this bundle's prefill program returns the logits of each row's last token alone; export it again with "
                "--all-logits to score text, or use decode, token by token"
            )
        return self.feed_all(*self._checked_prompt(token_ids, lengths))

    @in_plain_modes
    def decode(self, token_ids: Tensor) -> Tensor:
        """Feed one token to each row, token_ids (B); float32 logits (B, V).

        Where programs are captured, the next call overwrites the result. ValueError for ids out of range. Checking ids
        that are on a GPU waits for it.
        """
        return self.step(self._checked(token_ids, dims=1))

    # The same for callers that have checked their arguments and entered `PlainModes`. None of these waits for a GPU.

    def feed(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """`prefill` of int64 arguments that are in range."""
        device = self.runtime.device
        logits = torch.zeros(self.cache.batch, self.runtime.config.logits_size, dtype=torch.float32, device=device)
        for piece, valid in self._pieces(token_ids, lengths):
            logits = torch.where((valid > 0)[:, None], self._prefill_piece(piece, valid), logits)
        return logits

    def feed_all(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """`score` of int64 arguments that are in range."""
        pieces = [self.run_score(piece, valid) for piece, valid in self._pieces(token_ids, lengths)]
        return torch.cat(pieces, dim=1)[:, : token_ids.shape[1]]

    def step(self, token_ids: Tensor) -> Tensor:
        """`decode` of int64 token ids that are in range."""
        token_ids = token_ids.to(self.runtime.device).contiguous()  # programs read memory, not strides
        if not self.captures:
            return self.run_decode(token_ids)
        if self._decode_graph is None:
            self._decode_graph = CapturedDecode(self.run_decode, self.cache)
        return self._decode_graph(token_ids)

    def capture_step(self, step: Callable[[], None], others: Sequence[Tensor]) -> CapturedStep:
        """Capture a step that feeds one token to every row; only where `captures`.

        `step` may read and write the cache and `others`, which stay where they are, and nothing else.
        """
        return CapturedStep(step, self.cache, others)

    def _prefill_piece(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        if not self.captures:
            return self.run_prefill(token_ids, lengths)
        return self._prefills(self.run_prefill, token_ids, lengths)

    def _pieces(self, token_ids: Tensor, lengths: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Cut a prompt into calls of the program: padded ids, and how many tokens of each row count."""
        limits, device = self.runtime.limits, self.runtime.device
        token_ids, lengths = token_ids.to(device), lengths.to(device)
        for start in range(0, token_ids.shape[1], limits.max_length):
            piece = token_ids[:, start : start + limits.max_length]
            valid = (lengths - start).clamp(0, piece.shape[1])
            yield F.pad(piece, (0, -piece.shape[1] % limits.length_multiple)).contiguous(), valid

    def _checked_prompt(self, token_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        token_ids = self._checked(token_ids, dims=2)
        batch, length = token_ids.shape
        right = lengths.dtype in _INTEGERS and lengths.shape == (batch,)
        if not right or bool(((lengths < 0) | (lengths > length)).any()):
            raise ValueError(f"lengths must be (B,) = ({batch},) integers in 0..{length}, got {lengths.tolist()}")
        return token_ids, lengths.to(torch.int64)

    def _checked(self, token_ids: Tensor, dims: int) -> Tensor:
        self.runtime.check_process()
        shape, batch = "(B,)" if dims == 1 else "(B, L)", self.cache.batch
        if not isinstance(token_ids, Tensor):
            raise ValueError(f"token_ids are of type {type(token_ids).__name__}, expected a tensor {shape}")
        if token_ids.dim() != dims or token_ids.shape[0] != batch or not token_ids.numel():
            raise ValueError(f"token_ids must be {shape} with B = {batch}, got {tuple(token_ids.shape)}")
        if token_ids.dtype not in _INTEGERS:
            raise ValueError(f"token_ids are of {token_ids.dtype}, expected integers: torch.int64")
        check_ids(token_ids, self.runtime.config.vocab_size)
        return token_ids.to(torch.int64)
