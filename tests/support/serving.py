"""Requests to an engine, and what comes back."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from megalodon_export.generation.sampling import SamplingParams
from megalodon_export.serving.engine import Engine
from megalodon_export.serving.streams import Request, Stream, Token, Update

TIMEOUT = 60  # seconds, for what takes far less unless something hangs


@dataclass
class Answer:
    """All that a stream has written."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    prompt: list[Token] = field(default_factory=list)
    cached_tokens: int = 0
    reason: str | None = None
    error: str | None = None
    last: Update = field(default_factory=Update)

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    def add(self, update: Update) -> None:
        self.text += update.text
        self.tokens += update.tokens
        self.prompt += update.prompt
        self.cached_tokens = max(self.cached_tokens, update.cached_tokens)
        self.reason, self.error, self.last = update.finish_reason, update.error, update


class Reader:
    """Collects the answers of one request."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self._news = threading.Event()
        self.streams: list[Stream] = engine.submit(request, self._news.set)
        self.answers = [Answer() for _ in self.streams]

    def wait(self, tokens: int | None = None) -> list[Answer]:
        """Wait until all streams are over, or have written a number of tokens."""
        while True:
            for stream, answer in zip(self.streams, self.answers, strict=True):
                if not answer.last.is_last:
                    answer.add(stream.take())
            done = [a.last.is_last or (tokens is not None and len(a.tokens) >= tokens) for a in self.answers]
            if all(done):
                return self.answers
            assert self._news.wait(TIMEOUT), "the engine hangs"
            self._news.clear()


def request(prompt: list[int], count: int = 8, **fields: Any) -> Request:
    """A request with sampling parameters among its fields."""
    names = ("temperature", "top_k", "top_p", "min_p", "seed")
    params = SamplingParams(**{name: fields.pop(name) for name in names if name in fields})
    return Request(prompt, count, params, **fields)


def answers(engine: Engine, prompt: list[int], count: int = 8, **fields: Any) -> list[Answer]:
    """What all streams of a request write."""
    found = Reader(engine, request(prompt, count, **fields)).wait()
    assert not any(answer.error for answer in found), found
    return found


def ids(engine: Engine, prompt: list[int], count: int = 8, **fields: Any) -> list[int]:
    """The tokens of a request of one stream."""
    (answer,) = answers(engine, prompt, count, **fields)
    return answer.ids
