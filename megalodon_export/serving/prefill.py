"""Prompts, fed in pieces between the steps of running streams, so that a long prompt does not stall them.

A piece ends where a multiple of the tree's interval is reached, or after `piece` tokens since the last such multiple.
So a prompt is cut at the same places whatever else runs. Prompts take turns at multiples of the interval, where a state
is small to put aside. There, a prompt also looks for states that others have kept in the meantime.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtimes import Runtime
from .choosing import with_logprobs
from .prefix_tree import Cursor, PrefixTree
from .states import StateCopier, StreamState, reset_row
from .streams import Request, Stream, Token

_LOG = logging.getLogger(__name__)


class Prompt:
    """A request whose prompt is being fed, and the streams that wait for it."""

    def __init__(self, request: Request, streams: list[Stream]) -> None:
        self.request, self.streams = request, streams
        pending = [] if request.pending is None else [request.pending]
        self.tokens = array("q", [*pending, *request.prompt])
        self.fed = 0  # of `tokens`, including those whose state was found
        self.cached_tokens = 0
        self.state = request.state  # while another prompt is being fed; None for a fresh stream
        self.cursor: Cursor | None = None
        self.scored: list[Token] = []
        self.logits: Tensor | None = None  # (V), after the last token

    @property
    def is_fed(self) -> bool:
        """Whether all tokens were fed and logits are there."""
        return self.fed == len(self.tokens)

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for any of its streams."""
        return all(stream.cancelled for stream in self.streams)

    def close(self) -> None:
        """Let go of the tree."""
        if self.cursor is not None:
            self.cursor.close()
            self.cursor = None


class Prefiller:
    """Feeds prompts in a cache of one row."""

    def __init__(self, runtime: Runtime, tree: PrefixTree | None, interval: int, piece: int) -> None:
        self._runtime, self._tree, self._interval, self._piece = runtime, tree, interval, piece
        self._cache = runtime.new_cache(1)
        self._programs = runtime.bind(self._cache)
        self._copier = StateCopier(runtime.config)
        self._current: Prompt | None = None  # whose state the cache holds

    def feed(self, prompt: Prompt) -> int:
        """Feed one piece, or find that a state makes it unnecessary; how many tokens were fed."""
        self._load(prompt)
        if prompt.cursor is None and self._tree is not None and prompt.request.state is None:
            prompt.cursor = self._tree.cursor(prompt.request.owner)
        self._find(prompt)
        if prompt.is_fed:
            return 0
        start = self._position(prompt)
        count = min(self._end_of_piece(start) - start, len(prompt.tokens) - prompt.fed)
        piece = prompt.tokens[prompt.fed : prompt.fed + count]
        logits = self._run(prompt, piece)
        prompt.fed += count
        if prompt.cursor is not None:
            prompt.cursor.advance(piece)
            if (start + count) % self._interval == 0 or prompt.is_fed:
                self._keep(prompt.cursor, start + count, logits)
        if prompt.is_fed:
            prompt.logits = logits.clone()
        return count

    def may_pause(self, prompt: Prompt) -> bool:
        """Whether another prompt may take over now: this one's state is small."""
        return self._position(prompt) % self._interval == 0

    def take(self, prompt: Prompt) -> StreamState:
        """The state after the last token of a prompt that was fed."""
        self._load(prompt)
        return self._copier.take(self._cache, 0, self._position(prompt), prompt.logits)

    def drop(self, prompt: Prompt, clean: bool = False) -> None:
        """Forget a prompt; `clean` after a fault, which may have left NaN."""
        if self._current is prompt:
            self._current = None
        if clean:
            reset_row(self._runtime.config, self._cache, 0)
        prompt.close()

    def _load(self, prompt: Prompt) -> None:
        """Make the cache hold a prompt's state."""
        if self._current is prompt:
            return
        if self._current is not None:
            position = self._position(self._current)
            self._current.state = self._copier.take(self._cache, 0, position)
        if prompt.state is None:
            reset_row(self._runtime.config, self._cache, 0)
        else:
            self._copier.put(prompt.state, self._cache, 0)
        self._current = prompt

    def _find(self, prompt: Prompt) -> None:
        """Go on to a state that was kept, if there is one ahead."""
        scores = prompt.request.prompt_logprobs is not None  # every token must be fed to be scored
        if prompt.cursor is None or scores or (prompt.fed and not self.may_pause(prompt)):
            return
        found = prompt.cursor.find(prompt.tokens, prompt.fed)
        if found is None:
            return
        state, end = found
        self._copier.put(state, self._cache, 0)
        prompt.cached_tokens += end - prompt.fed
        prompt.fed, prompt.logits = end, state.logits if end == len(prompt.tokens) else None

    def _run(self, prompt: Prompt, piece: Sequence[int]) -> Tensor:
        """Feed tokens; logits (V) after the last."""
        ids = torch.tensor([list(piece)], dtype=torch.int64, device="cpu")
        lengths = torch.tensor([len(piece)], dtype=torch.int64, device="cpu")
        most = prompt.request.prompt_logprobs
        if most is None:
            return self._programs.feed(ids, lengths)[0]
        if self._runtime.can_score:
            logits = self._programs.feed_all(ids, lengths)[0, : len(piece)]
        else:
            logits = torch.stack([self._programs.step(ids[0, i : i + 1])[0].clone() for i in range(len(piece))])
        following = prompt.tokens[prompt.fed + 1 : prompt.fed + 1 + len(piece)]
        if not prompt.fed:
            prompt.scored.append(Token(prompt.tokens[0]))
        if following:
            targets = torch.tensor(list(following), dtype=torch.int64, device="cpu").to(logits.device)
            prompt.scored += with_logprobs(logits[: len(following)], targets, most)
        return logits[-1]

    def _keep(self, cursor: Cursor, position: int, logits: Tensor) -> None:
        """Keep the state. Where there is no memory for it, that costs hits alone."""
        try:
            cursor.keep(self._copier.take(self._cache, 0, position, logits))
        except Exception:
            _LOG.exception("a state could not be kept")

    def _end_of_piece(self, position: int) -> int:
        since = position % self._interval
        return position + min((since // self._piece + 1) * self._piece, self._interval) - since

    @staticmethod
    def _position(prompt: Prompt) -> int:
        begin = 0 if prompt.request.state is None else prompt.request.state.position
        return begin + prompt.fed
