"""From the engine's thread to an event loop: the updates of all streams that answer one HTTP request."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Sequence
from weakref import WeakKeyDictionary, ref

from .engine import Engine, Refused
from .errors import ApiError, bad
from .streams import Request, Stream, Update


class _Bell:
    """Wakes the readers of an event loop. However many have news after a step, the loop is interrupted once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)
        self._lock, self._waiting = threading.Lock(), list[asyncio.Event]()

    def ring(self, event: asyncio.Event) -> None:
        """Set an event of the loop; from any thread."""
        with self._lock:
            self._waiting.append(event)
            if len(self._waiting) > 1:
                return
        loop = self._loop()
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        with self._lock:
            events, self._waiting = self._waiting, []
        for event in events:
            event.set()


_bells: WeakKeyDictionary[asyncio.AbstractEventLoop, _Bell] = WeakKeyDictionary()


class Generation:
    """The streams of some requests, numbered in order. `cancel` it when nobody reads on."""

    def __init__(self, engine: Engine, requests: Sequence[Request], seconds: float) -> None:
        """Queues the requests; ApiError if the engine takes one of them not, and then none. `seconds` bound it all."""
        self._engine, self._loop, self._news = engine, asyncio.get_running_loop(), asyncio.Event()
        self._bell = _bells.setdefault(self._loop, _Bell(self._loop))
        self._until = self._loop.time() + seconds
        self.streams: list[Stream] = []
        try:
            for request in requests:
                self.streams += engine.submit(request, self._notify)
        except Refused as error:
            self.cancel()
            wait = error.retry_after
            headers = {} if wait is None else {"Retry-After": str(wait)}
            raise ApiError(429 if wait else 503, str(error), headers=headers) from None
        except ValueError as error:
            self.cancel()
            raise bad(str(error)) from None

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """What is new, with the number of its stream, until all streams are over. ApiError for one that fails."""
        left = dict(enumerate(self.streams))
        while left:
            self._news.clear()
            for index, stream in list(left.items()):
                update = stream.take()
                if update.error is not None:
                    raise ApiError(400 if update.is_refusal else 500, update.error)
                if update.is_last:
                    del left[index]
                if update.is_news:
                    yield index, update
            if left:
                try:
                    async with asyncio.timeout_at(self._until):
                        await self._news.wait()
                except TimeoutError:
                    raise ApiError(408, "the request took too long; ask for fewer tokens", code="timeout") from None

    def cancel(self) -> None:
        """End the streams that are not over."""
        for stream in self.streams:
            stream.cancel()
        self._engine.wake()

    def _notify(self) -> None:
        self._bell.ring(self._news)
