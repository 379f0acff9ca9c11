"""How much an engine does at a time, and what it says when it takes no request."""

from __future__ import annotations

from dataclasses import dataclass


class Refused(Exception):
    """The engine takes no request now. `retry_after` is in seconds; None where it will take none at all."""

    def __init__(self, message: str, retry_after: int | None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class EngineOptions:
    """streams: run at the same time. queue: requests that wait. piece: tokens of a prompt fed between two steps.

    device_bytes, host_bytes: for kept states. keep: False keeps none.
    """

    streams: int = 32
    queue: int = 256
    piece: int = 256
    device_bytes: int = 1 << 30
    host_bytes: int = 1 << 30
    keep: bool = True
