"""What goes into the engine and comes out of it: requests, and the streams that answer them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tokenizers import Tokenizer
from torch import Tensor

from ..generation.sampling import SamplingParams
from ..generation.text import TextStream
from .states import StreamState


class Constraint(Protocol):
    """Which tokens may come next in one stream."""

    def mask(self) -> Tensor:
        """The tokens that may come next, (V) bool on the CPU."""

    def accept(self, token: int) -> None:
        """The stream has got this token."""

    @property
    def is_over(self) -> bool:
        """Whether nothing may follow."""


@dataclass(frozen=True)
class LogitRules:
    """What changes a stream's logits before a token is chosen. The defaults change nothing.

    presence_penalty, frequency_penalty: subtracted for each token generated before, once and by its count
    repetition_penalty: divides positive logits, and multiplies negative ones, of tokens in the prompt or the answer
    bias: added, by token id
    constraint: makes one constraint for each stream
    """

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    bias: dict[int, float] = field(default_factory=dict)
    constraint: Callable[[], Constraint] | None = None


@dataclass(frozen=True)
class Request:
    """A prompt to be continued by `n` streams. Stream i samples with seed + i modulo 2**64.

    prompt: token ids, at least one unless `state` has a pending token
    max_tokens: 0 feeds the prompt alone
    eos_token_id: ends a stream; None for no such token
    logprobs: how many of the most probable tokens to report beside each generated one; None for no logprobs
    prompt_logprobs: the same for the tokens of the prompt
    state, pending: go on from this state, whose last token was not fed yet
    keep_state: the last update of each stream has its state
    owner: streams of one owner alone reuse each other's states
    """

    prompt: Sequence[int]
    max_tokens: int
    params: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1
    eos_token_id: int | None = None
    stop: tuple[str, ...] = ()
    rules: LogitRules = field(default_factory=LogitRules)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    state: StreamState | None = None
    pending: int | None = None
    keep_state: bool = False
    owner: str = ""


@dataclass(frozen=True)
class Token:
    """A token of a stream. `top` are the most probable tokens and their logprobs, the most probable first."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Update:
    """What is new in a stream since the last update. `text` may lag behind `tokens` by an incomplete character.

    tokens: all that were generated, and so the token that ended the stream as well
    cached_tokens: the tokens of the prompt that were not fed, because a state after them was kept
    prompt: the tokens of the prompt with logprobs, where they were asked for
    finish_reason: "stop" or "length" in the last update
    state, pending: the stream's end, where the request asked for it
    error: why the stream failed, in the last update; is_refusal: that the request is to blame, not the server
    """

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    is_refusal: bool = False
    cached_tokens: int = 0
    prompt: list[Token] = field(default_factory=list)
    state: StreamState | None = None
    pending: int | None = None

    @property
    def is_last(self) -> bool:
        """Whether the stream is over."""
        return self.finish_reason is not None or self.error is not None

    @property
    def is_news(self) -> bool:
        """Whether there is anything for a reader."""
        return self.is_last or bool(self.text or self.tokens)


@dataclass
class Times:
    """When things happened to a stream, by `time.monotonic`; 0 for what has not happened."""

    submitted: float = field(default_factory=time.monotonic)
    started: float = 0.0  # its prompt began to be fed
    first_token: float = 0.0
    last_token: float = 0.0
    finished: float = 0.0


class Stream:
    """One answer. The engine's thread writes it, and any other thread takes what is new.

    `notify` is called, on the engine's thread, when there is something new after a `take`. Tokens become text on the
    reader's thread, so that the engine does not wait for it, unless a stop string may end the stream.
    """

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer | None, notify: Callable[[], None]) -> None:
        self.request, self.index, self.times = request, index, Times()
        self.generated: list[int] = []
        self.constraint = request.rules.constraint() if request.rules.constraint else None
        self.cancelled = False
        self._text = TextStream(tokenizer, request.stop) if tokenizer is not None else None
        self._reader_decodes = self._text is not None and not request.stop
        self._notify, self._lock, self._new, self._told = notify, threading.Lock(), Update(), False

    def take(self) -> Update:
        """What is new since the last call."""
        with self._lock:
            new, self._new, self._told = self._new, Update(), False
        if self._reader_decodes:
            new.text = "".join(map(self._decode, new.tokens)) + (self._flush() if new.finish_reason else "")
        return new

    def _decode(self, token: Token) -> str:
        """The text that a token completes; the end of the sequence is no text."""
        return "" if self._text is None or token.id == self.request.eos_token_id else self._text.push(token.id)

    def _flush(self) -> str:
        return "" if self._text is None else self._text.flush()

    def cancel(self) -> None:
        """Nobody reads the stream any more; the engine ends it after its step."""
        self.cancelled = True

    # The engine's side.

    def begin(self, cached_tokens: int, prompt: list[Token]) -> None:
        """The prompt has been fed."""
        with self._lock:
            self._new.cached_tokens, self._new.prompt = cached_tokens, prompt

    def accept(self, token: Token) -> str | None:
        """Add a token; why the stream ends with it, or None."""
        now = time.monotonic()
        self.times.first_token = self.times.first_token or now
        self.times.last_token = now
        self.generated.append(token.id)
        is_end = token.id == self.request.eos_token_id
        if self.constraint is not None and not is_end:
            self.constraint.accept(token.id)
        text = "" if self._reader_decodes else self._decode(token)
        with self._lock:
            self._new.text += text
            self._new.tokens.append(token)
        if is_end or (self.request.stop and self._text is not None and self._text.stopped):
            return "stop"
        if self.constraint is not None and self.constraint.is_over:
            return "stop"
        return "length" if len(self.generated) >= self.request.max_tokens else None

    def finish(self, reason: str, state: StreamState | None = None, pending: int | None = None) -> None:
        """The stream has ended by itself."""
        rest = "" if self._reader_decodes else self._flush()
        with self._lock:
            self._new.text += rest
            self._new.finish_reason, self._new.state, self._new.pending = reason, state, pending
        self.times.finished = time.monotonic()

    def fail(self, error: str, is_refusal: bool = False) -> None:
        """The stream has ended by a fault, of the server or of its request."""
        with self._lock:
            self._new.error, self._new.is_refusal = error, is_refusal
        self.times.finished = time.monotonic()

    def tell(self) -> None:
        """Wake the reader, once, if there is something new."""
        with self._lock:
            wanted = self._new.is_news and not self._told
            self._told = self._told or wanted
        if wanted:
            self._notify()
