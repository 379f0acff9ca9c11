"""Answers over ASGI: one JSON object, or server-sent events. Both end the generation when the client hangs up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError
from .generation import Generation

_LOG = logging.getLogger(__name__)
_SEND_SECONDS = 120.0  # a client that takes no byte for so long is gone

Events = AsyncIterator[Any]


def refusal(error: ApiError) -> Response:
    """An error as an answer."""
    return JSONResponse(error.body, error.status, error.headers)


def fault(error: BaseException) -> ApiError:
    """The answer to an error that is not the client's fault. The log has its details."""
    if isinstance(error, ApiError):
        return error
    _LOG.error("a request failed", exc_info=error)
    return ApiError(500, f"the server failed: {type(error).__name__}")


def event(data: Any, name: str | None = None) -> bytes:
    """A server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + (data if isinstance(data, bytes) else msgspec.json.encode(data)) + b"\n\n"


class _Watched(Response):
    """An answer that takes time. When the client hangs up, it is ended, and so is its generation."""

    def __init__(self, generation: Generation) -> None:
        super().__init__()
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The answer, by ASGI."""
        work = asyncio.create_task(self._answer(scope, receive, send))
        watch = asyncio.create_task(_hung_up(receive))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._generation.cancel()
            for task in (work, watch):
                task.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)
        if not work.cancelled() and isinstance(error := work.exception(), Exception):
            _LOG.debug("a client is gone: %s", error)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError


class WholeAnswer(_Watched):
    """One JSON object, which `made` waits for."""

    def __init__(self, generation: Generation, made: Callable[[], Awaitable[Any]]) -> None:
        super().__init__(generation)
        self._made = made

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            content = msgspec.json.encode(await self._made())
            response = Response(content, media_type="application/json")
        except Exception as error:
            response = refusal(fault(error))
        await response(scope, receive, send)


class EventAnswer(_Watched):
    """Server-sent events, each as soon as it is there. An error before the first one is an answer of its own."""

    def __init__(self, generation: Generation, events: AsyncIterator[bytes]) -> None:
        super().__init__(generation)
        self._events = events

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        try:
            async for data in self._events:
                if not begun:
                    head = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
                    await send({"type": "http.response.start", "status": 200, "headers": head})
                    begun = True
                async with asyncio.timeout(_SEND_SECONDS):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        except (OSError, TimeoutError):  # nobody reads
            return
        except Exception as error:
            told = fault(error)
            if not begun:
                await refusal(told)(scope, receive, send)
                return
            await send({"type": "http.response.body", "body": event(told.body), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _hung_up(receive: Receive) -> None:
    """Wait until the client hangs up."""
    while (await receive())["type"] != "http.disconnect":
        pass
