"""One line a request, without prompts and without answers."""

from __future__ import annotations

import json
import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..bundles.strict_json import shown

_LOG = logging.getLogger("megalodon_export.requests")


class RequestLog:
    """An application that logs what another one answers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The answer, by ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            client = scope.get("client") or ("-", 0)
            fields = {"client": client[0], "method": scope["method"], "path": shown(scope["path"])}
            seconds = round(time.monotonic() - started, 4)
            _LOG.info("request", extra={"fields": {**fields, "status": status, "seconds": seconds}})


class LineFormatter(logging.Formatter):
    """Log lines as text, or as JSON."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback is more."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        fields = getattr(record, "fields", {})
        error = self.formatException(record.exc_info) if record.exc_info and record.exc_info[0] else ""
        if self._as_json:
            line = {"time": stamp, "level": record.levelname, "message": record.getMessage(), **fields}
            return json.dumps(line | ({"error": error} if error else {}))
        words = " ".join(f"{name}={value}" for name, value in fields.items())
        return f"{stamp} {record.levelname} {record.getMessage()} {words}".rstrip() + (f"\n{error}" if error else "")
