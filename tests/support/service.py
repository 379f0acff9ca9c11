"""The example service as a process, and what its tests and its load test ask of it."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TIMEOUT = 60  # seconds, for what takes far less unless something hangs


class Service:
    """`megalodon-service BUNDLE OPTIONS` at a port of its own."""

    def __init__(self, program: Path, bundle: Path, *options: object, **environment: str) -> None:
        command = [str(program), str(bundle), "--port", "0", *map(str, options)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        found = re.search(r"^listening on http://127\.0\.0\.1:(\d+)$", self.process.stdout.readline())
        assert found, f"the service ended with status {self.process.wait()}"
        self.port = int(found[1])

    def request(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, str, http.client.HTTPMessage]:
        """Status, body and headers of the answer. A header's name has "_" for "-"."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            return response.status, response.read().decode(), response.headers
        finally:
            connection.close()

    def complete(self, **fields: Any) -> dict[str, Any]:
        """The answer to a completion that succeeds."""
        status, body, _ = self.request("POST", "/v1/completions", json.dumps(fields).encode())
        assert status == 200, body
        answer: dict[str, Any] = json.loads(body)
        return answer

    @contextmanager
    def stream(self, **fields: Any) -> Iterator[Iterator[Any]]:
        """The events of a streamed completion; leaving hangs up."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        connection.request("POST", "/v1/completions", json.dumps({"stream": True, **fields}).encode())
        response = connection.getresponse()
        assert response.status == 200, response.read()
        assert response.headers["Content-Type"] == "text/event-stream"
        try:
            yield events(response)
        finally:
            response.close()
            connection.close()

    def send(self, data: bytes) -> socket.socket:
        """A connection on which this was sent, as it is."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT)
        connection.sendall(data)
        return connection

    def metrics(self) -> dict[str, float]:
        """All metrics, by name and labels."""
        lines = self.request("GET", "/metrics")[1].splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    def await_value(self, name: str, value: float) -> None:
        """Wait until a metric has a value."""
        for _ in range(10 * TIMEOUT):
            if (found := self.metrics()[name]) == value:
                return
            time.sleep(0.1)
        raise AssertionError(f"{name} is {found}, {value} expected")

    def outcomes(self) -> dict[str, int]:
        """Requests by outcome."""
        found = {re.match(r'megalodon_requests_total{outcome="(\w+)"}', name): n for name, n in self.metrics().items()}
        return {match[1]: int(count) for match, count in found.items() if match}

    def terminate(self) -> int:
        """SIGTERM; the exit status."""
        self.process.terminate()
        return self.process.wait(TIMEOUT)


def events(response: http.client.HTTPResponse) -> Iterator[Any]:
    """What an event stream holds, as JSON; its end is the string "[DONE]"."""
    while line := response.readline():
        if line.strip():
            assert line.startswith(b"data: ")
            data = line.removeprefix(b"data: ").decode().strip()
            yield data if data == "[DONE]" else json.loads(data)


class _Unclosed(io.BufferedReader):
    """What a connection sends. An answer closes what it has read from; the next answer is in the same bytes."""

    def close(self) -> None:
        pass


def answers(connection: socket.socket, count: int) -> list[tuple[int, str, http.client.HTTPMessage]]:
    """The next answers on a connection: status, body and headers."""
    file = _Unclosed(connection.makefile("rb", buffering=0))
    read = []
    for _ in range(count):
        response = http.client.HTTPResponse(SimpleNamespace(makefile=lambda _: file))  # type: ignore[arg-type]
        response.begin()
        read.append((response.status, response.read().decode(), response.headers))
    return read


def completion(version: str = "1.1", **fields: Any) -> bytes:
    """The bytes of a request."""
    body = json.dumps(fields).encode()
    head = f"POST /v1/completions HTTP/{version}\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body
