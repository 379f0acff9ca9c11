"""Requests to an engine, and what comes back."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import subprocess
import threading
from dataclasses import dataclass, field
from typing import Any

from megalodon_export.generation.sampling import SamplingParams
from megalodon_export.serving.engine import Engine
from megalodon_export.serving.streams import Request, Stream, Token, Update
from support.service import Service

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


class Client(Service):
    """Requests to a server at a port, with an API key or without."""

    def __init__(self, port: int, key: str | None = None) -> None:
        self.port, self.headers = port, {} if key is None else {"Authorization": f"Bearer {key}"}

    def get(self, path: str, status: int = 200) -> Any:
        """The JSON of an answer with this status."""
        return self._json("GET", path, None, status)

    def delete(self, path: str, status: int = 200) -> Any:
        """The JSON of an answer with this status."""
        return self._json("DELETE", path, None, status)

    def post(self, path: str, status: int = 200, **fields: Any) -> Any:
        """The JSON of an answer with this status."""
        return self._json("POST", path, json.dumps(fields).encode(), status)

    def download(self, path: str) -> bytes:
        """The bytes of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        with contextlib.closing(connection):
            connection.request("GET", path, headers=self.headers)
            response = connection.getresponse()
            assert response.status == 200
            return response.read()

    def events(self, path: str, **fields: Any) -> list[Any]:
        """All events of a streamed answer: their data as JSON, or "[DONE]"."""
        body = json.dumps({"stream": True, **fields}).encode()
        status, text, headers = self.request("POST", path, body, **self.headers)
        assert status == 200, text
        assert headers["Content-Type"].startswith("text/event-stream")
        data = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
        return [one if one == "[DONE]" else json.loads(one) for one in data]

    def _json(self, method: str, path: str, body: bytes | None, status: int) -> Any:
        found, text, _ = self.request(method, path, body, **self.headers)
        assert found == status, text
        return json.loads(text)


def port_of(process: subprocess.Popen[str]) -> int:
    """The port that a server says it listens on."""
    assert process.stdout is not None
    found = re.search(r"^listening on http://127\.0\.0\.1:(\d+)$", process.stdout.readline())
    assert found, f"the server ended with status {process.wait(TIMEOUT)}"
    return int(found[1])
