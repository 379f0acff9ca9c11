"""The engine: one thread that owns the runtime, feeds prompts, and steps all running streams together.

    engine = Engine(runtime, tokenizer)
    (stream,) = engine.submit(Request(prompt=[1, 2, 3], max_tokens=8), notify)
    ...                        # `notify` is called when there is something to take
    update = stream.take()     # until `update.is_last`

Streams join and leave between two steps. A stream's tokens depend on its request alone: not on the other streams, nor
on when they come and go (on a GPU its numbers may differ by roundings between sizes of the batch). The engine knows
nothing of HTTP.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from tokenizers import Tokenizer
from torch import Tensor

from ..generation.sampling import raise_logit_errors
from ..runtimes import PlainModes, Runtime
from .choosing import Chooser
from .engine_options import EngineOptions, Refused
from .observer import Observer
from .prefill import Prefiller, Prompt
from .prefix_tree import Cursor, PrefixTree
from .rows import Rows
from .state_store import StateStore
from .states import StreamState
from .streams import Request, Stream, Token

__all__ = ["Engine", "EngineOptions", "Refused"]

_LOG = logging.getLogger(__name__)
_MOST_FAULTS = 5  # failed calls one after another; then the device is taken for lost
_MIN_INTERVAL = 64  # tokens between two kept states of a prompt, rounded up to whole chunks


class _Running:
    """A stream in a row of the batch. `cursor` is where it is in the tree; None for one that is not in it."""

    def __init__(self, stream: Stream, token: int, cursor: Cursor | None) -> None:
        self.stream, self.pending, self.cursor = stream, token, cursor


class Engine:
    """See the module. `close` ends its thread."""

    def __init__(
        self,
        runtime: Runtime,
        tokenizer: Tokenizer | None = None,
        options: EngineOptions | None = None,
        observer: Observer | None = None,
        store: StateStore | None = None,
    ) -> None:
        options = options or EngineOptions()
        self.runtime, self.tokenizer, self.options = runtime, tokenizer, options
        self._observer = observer or Observer()
        chunk = runtime.config.chunk_size
        self.interval = -(-_MIN_INTERVAL // chunk) * chunk
        with PlainModes():
            self._rows = Rows(runtime, min(options.streams, runtime.limits.max_batch))
            self.store = store or StateStore(runtime.config, runtime.device, options.device_bytes, options.host_bytes)
            self._tree = PrefixTree(self.store, self.interval) if options.keep else None
            self._prefiller = Prefiller(runtime, self._tree, self.interval, min(options.piece, self.interval))
        self._prompts: deque[Prompt] = deque()
        self._running: list[_Running] = []
        self._faults = 0  # failed calls since the last one that succeeded
        self._news: list[Stream] = []  # whose readers are to be told
        self._chooser: Chooser | None = None
        self._queue: deque[tuple[Request, list[Stream]]] = deque()
        self._changed = threading.Condition()
        self._draining = self._closing = False
        self._idle = True
        self._prompting = 0  # streams whose prompts are being fed
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def capacity(self) -> int:
        """Streams that run at the same time."""
        return self._rows.capacity

    @property
    def running(self) -> int:
        """Streams that have been admitted and are not over."""
        return len(self._running) + self._prompting

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused because the engine is to end."""
        return self._draining

    @property
    def failure(self) -> str | None:
        """Why the engine's thread has ended, if it has ended by a fault."""
        return self._failure

    def submit(self, request: Request, notify: Callable[[], None]) -> list[Stream]:
        """Queue a request; its streams. Refused if the queue is full or the engine ends.

        ValueError for a request that can never run.
        """
        if not request.prompt and request.pending is None:
            raise ValueError("the prompt is empty; give at least one token")
        if not 1 <= request.n <= self.capacity:
            raise ValueError(f"n is {request.n}, expected 1..{self.capacity}, the streams that can run at once")
        streams = [Stream(request, index, self.tokenizer, notify) for index in range(request.n)]
        with self._changed:
            if self._failure is not None:
                raise Refused(f"the engine has stopped: {self._failure}", None)
            if self._draining:
                raise Refused("the server is shutting down", None)
            if len(self._queue) >= self.options.queue:
                raise Refused(f"{len(self._queue)} requests wait already; try again later", 1)
            self._queue.append((request, streams))
            self._changed.notify_all()
        return streams

    def wake(self) -> None:
        """Let the engine notice that a stream was cancelled."""
        with self._changed:
            self._changed.notify_all()

    def drain(self, timeout: float) -> bool:
        """Refuse new requests and wait until the present ones are over; whether they are."""
        with self._changed:
            self._draining = True
            self._changed.wait_for(lambda: self._failure or (self._idle and not self._queue), timeout)
            return self._idle and not self._queue

    def close(self) -> None:
        """End the thread; streams that are not over fail."""
        with self._changed:
            self._draining = self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        try:
            with PlainModes():
                while self._wait():
                    self._admit()
                    self._feed_prompts()
                    self._tell()
                    self._step()
                    self._tell()
            self._fail_all("the server is shutting down")
        except BaseException as error:  # a fault of this program: nothing more can be answered
            _LOG.exception("the engine has stopped")
            self._failure = f"{type(error).__name__}: {error}"
            self._fail_all(self._failure)
            self.wake()

    def _wait(self) -> bool:
        """Wait for work; False when the engine is to end."""
        with self._changed:
            while not (self._closing or self._queue or self._prompts or self._running):
                self._idle = True
                self._changed.notify_all()  # for `drain`
                self._changed.wait()
            self._idle = False
            return not self._closing

    def _admit(self) -> None:
        """Take requests from the queue while there are rows for their streams."""
        with self._changed:
            for request, streams in [one for one in self._queue if all(stream.cancelled for stream in one[1])]:
                self._queue.remove((request, streams))
                self._observe_aborted(streams)
            while self._queue and self.running + len(self._queue[0][1]) <= self.capacity:
                request, streams = self._queue.popleft()
                for stream in streams:
                    stream.times.started = time.monotonic()
                self._prompts.append(Prompt(request, streams))
                self._prompting += len(streams)

    def _feed_prompts(self) -> None:
        """Feed up to `piece` tokens of prompts, then let those that were fed whole join."""
        for prompt in [prompt for prompt in self._prompts if prompt.is_cancelled]:
            self._leave(prompt)
        budget = self.options.piece
        while self._prompts and budget > 0:
            prompt = self._prompts[0]
            try:
                fed = self._prefiller.feed(prompt)
                self._observer.fed(fed)
                if prompt.is_fed:
                    self._join(prompt)
                elif self._prefiller.may_pause(prompt):
                    self._prompts.rotate(-1)
            except Exception as error:
                _LOG.exception("a prompt failed")
                self._leave(prompt, f"the prompt could not be fed: {error}")
                self._count_fault(error)
                return
            self._faults = 0
            budget -= max(fed, 1)

    def _join(self, prompt: Prompt) -> None:
        """Choose the first tokens of a prompt's streams, and let the streams run."""
        state = self._prefiller.take(prompt)
        self._prompts.remove(prompt)
        self._prompting -= len(prompt.streams)
        self._observer.begun(len(prompt.tokens), prompt.cached_tokens)
        self._observe_aborted([stream for stream in prompt.streams if stream.cancelled])
        reasons = [self._begin(stream, prompt, state) for stream in prompt.streams if not stream.cancelled]
        self._prefiller.drop(prompt, clean="error" in reasons)

    def _begin(self, stream: Stream, prompt: Prompt, state: StreamState) -> str | None:
        """Choose a stream's first token, and give it a row; why it is over already, or None."""
        running = _Running(stream, -1, None if prompt.cursor is None else prompt.cursor.fork())
        stream.begin(prompt.cached_tokens, prompt.scored)
        try:
            if not prompt.request.max_tokens:
                return self._end(running, "length", lambda: state)
            assert state.logits is not None
            chooser = Chooser([stream], self.runtime.device, self.runtime.config.logits_size)
            (token,), (error,) = chooser.choose(state.logits[None])
            reason = self._accept(running, token, error, lambda: state)
            if reason is None:
                self._rows.append(state)
                self._running.append(running)
                self._chooser = None
            return reason
        except Exception as fault:
            _LOG.exception("a stream could not begin")
            return self._fail(running, f"the stream could not begin: {fault}")

    def _step(self) -> None:
        """Feed every running stream its last token, and choose the next one."""
        for row in reversed([row for row, one in enumerate(self._running) if one.stream.cancelled]):
            self._remove(row)
        if not self._running:
            return
        started = time.monotonic()
        try:
            if self._chooser is None:
                streams = [one.stream for one in self._running]
                self._chooser = Chooser(streams, self.runtime.device, self.runtime.config.logits_size)
            logits = self._rows.step([one.pending for one in self._running])
            tokens, errors = self._chooser.choose(logits)
        except Exception as fault:
            _LOG.exception("a step failed")
            self._fail_running(f"a step failed: {fault}")
            self._count_fault(fault)
            return
        self._faults = 0
        self._observer.stepped(len(self._running), time.monotonic() - started)
        over = []
        for row, (running, token, error) in enumerate(zip(self._running, tokens, errors, strict=True)):
            take = partial(self._take, row, logits)
            if running.cursor is not None:
                running.cursor.advance([running.pending])
                if not error and self._rows.positions[row] % self.interval == 0:
                    self._keep(running.cursor, take)
            if reason := self._accept(running, token, error, take):
                over.append(row)
                if reason == "error":
                    self._rows.clean(row)
        for row in reversed(over):
            self._remove(row, closed=True)

    def _take(self, row: int, logits: Tensor) -> StreamState:
        """A copy of the state of a stream that has been fed its token, with its row of logits (B, V)."""
        return self._rows.take(row, logits[row])

    @staticmethod
    def _keep(cursor: Cursor, take: Callable[[], StreamState]) -> None:
        """Keep a state, of which `take` makes a copy. Where there is no memory for it, that costs hits alone."""
        try:
            cursor.keep(take())
        except Exception:
            _LOG.exception("a state could not be kept")

    def _accept(self, running: _Running, token: Token, error: int, take: Callable[[], StreamState]) -> str | None:
        """Give a stream its next token; why it is over, or None. `take` makes a copy of what was fed to it."""
        stream, before = running.stream, running.stream.times.last_token
        try:
            if error:
                raise_logit_errors([error], self.runtime.config.logits_size)
            if token.id >= self.runtime.config.vocab_size:
                raise ValueError(f"the model chose token {token.id}, which it cannot be fed")
            reason = stream.accept(token)
        except Exception as fault:
            # A grammar may lead to where no token may follow, and a bias may be all that a model cannot follow.
            blame = stream.constraint is not None or bool(stream.request.rules.bias)
            return self._fail(running, f"the stream could not go on: {fault}", blame)
        running.pending = token.id
        self._observer.chosen(stream, before)
        if reason is not None:
            return self._end(running, reason, take)
        self._news.append(stream)
        return None

    def _end(self, running: _Running, reason: str, take: Callable[[], StreamState]) -> str:
        """Finish a stream, and keep its state, of which `take` makes a copy; the reason, or "error"."""
        stream, copy, pending = running.stream, None, None
        if stream.request.keep_state:
            try:
                copy = take()
            except Exception as fault:
                _LOG.exception("a state could not be copied")
                return self._fail(running, f"the stream's state could not be copied: {fault}")
            pending = stream.generated[-1] if stream.generated else None
        if running.cursor is not None:
            self._keep(running.cursor, take if copy is None else lambda: copy)
        self._close(running)
        stream.finish(reason, copy, pending)
        self._observer.ended(stream, reason)
        self._news.append(stream)
        return reason

    def _fail(self, running: _Running, error: str, is_refusal: bool = False) -> str:
        """End a stream by a fault."""
        self._close(running)
        running.stream.fail(error, is_refusal)
        self._observer.ended(running.stream, "error")
        self._news.append(running.stream)
        return "error"

    def _tell(self) -> None:
        """Wake the readers of streams with news, when the rows of those that are over are free."""
        for stream in self._news:
            stream.tell()
        self._news = []

    def _close(self, running: _Running) -> None:
        if running.cursor is not None:
            running.cursor.close()
            running.cursor = None

    def _remove(self, row: int, closed: bool = False) -> None:
        """Take a stream out of the batch; the last one gets its row."""
        running = self._running[row]
        if not closed:
            self._close(running)
            self._observer.ended(running.stream, "abort")
        self._rows.remove(row)
        last = self._running.pop()
        if last is not running:
            self._running[row] = last
        self._chooser = None

    def _leave(self, prompt: Prompt, error: str | None = None) -> None:
        """Drop a prompt that was cancelled, or that failed."""
        self._prompts.remove(prompt)
        self._prompting -= len(prompt.streams)
        self._prefiller.drop(prompt, clean=error is not None)
        for stream in prompt.streams:
            self._observer.ended(stream, "abort" if error is None else "error")
            if error is not None:
                stream.fail(error)
                self._news.append(stream)

    def _observe_aborted(self, streams: list[Stream]) -> None:
        for stream in streams:
            self._observer.ended(stream, "abort")

    def _count_fault(self, fault: Exception) -> None:
        """Give up after many faults in a row: a GPU may be lost, and only a new process gets it back."""
        self._faults += 1
        if self._faults >= _MOST_FAULTS:
            raise RuntimeError(f"{self._faults} calls in a row have failed; restart the server") from fault

    def _fail_running(self, error: str) -> None:
        for running in self._running:
            self._fail(running, error)
        self._running, self._chooser = [], None
        self._rows.clear()

    def _fail_all(self, error: str) -> None:
        self._fail_running(error)
        for prompt in list(self._prompts):
            self._leave(prompt, error)
        with self._changed:
            queued, self._queue = self._queue, deque()
        for _, streams in queued:
            for stream in streams:
                stream.fail(error)
                self._news.append(stream)
        self._tell()
