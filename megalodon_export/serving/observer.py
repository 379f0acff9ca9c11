"""What somebody who watches the engine is told. The metrics are made from this."""

from __future__ import annotations

from .streams import Stream


class Observer:
    """Called on the engine's thread. These methods do nothing; a subclass counts."""

    def fed(self, tokens: int) -> None:
        """A piece of a prompt was fed."""

    def stepped(self, rows: int, seconds: float) -> None:
        """A step has fed one token to each of `rows` streams."""

    def begun(self, prompt_tokens: int, cached_tokens: int) -> None:
        """A prompt is in the state of its streams; `cached_tokens` of it did not have to be fed."""

    def chosen(self, stream: Stream, before: float) -> None:
        """A stream has got a token. `before` is when it got the one before, 0 for none."""

    def ended(self, stream: Stream, reason: str) -> None:
        """A stream is over: "stop", "length", "abort" or "error"."""
