"""`megalodon-export serve` as a process: it starts, answers, drains, and keeps what it has acknowledged."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.serving import TIMEOUT, Client, port_of

Start = Callable[..., tuple[subprocess.Popen[str], Client]]


@pytest.fixture
def start(command: Callable[..., subprocess.Popen[str]], tiny_bundle: Path) -> Iterator[Start]:
    """Starts `serve` on the small bundle; what is left is killed with the test."""
    started: list[subprocess.Popen[str]] = []

    def run(*options: object) -> tuple[subprocess.Popen[str], Client]:
        process = command("serve", tiny_bundle, "--port", 0, "--name", "small", *options)
        started.append(process)
        return process, Client(port_of(process))

    yield run
    for process in started:
        process.kill()
        process.wait()


def test_a_server_from_start_to_end(start: Start, tmp_path: Path) -> None:
    """It answers, refuses a second server on its states, ends what runs after SIGTERM, and logs no prompt."""
    process, client = start("--state-dir", tmp_path, "--log-json")
    secret = "nobody logs this"
    assert client.complete(prompt=secret, max_tokens=2)["model"] == "small"
    stored = client.post("/v1/responses", input=secret, max_output_tokens=4, temperature=0)

    body = json.dumps({"prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with client.send(head + body) as running:
        received = running.recv(1000)
        process.send_signal(signal.SIGTERM)
        while data := running.recv(1 << 16):
            received += data
    assert b'"finish_reason":"length"' in received
    assert b"data: [DONE]" in received
    _, log = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, log
    lines = [json.loads(line) for line in log.splitlines()]
    requests = [line for line in lines if line["message"] == "request"]
    assert {"client", "method", "path", "status", "seconds"} <= requests[0].keys()
    assert secret not in log

    process, client = start("--state-dir", tmp_path)
    again = client.post("/v1/responses", input="x", previous_response_id=stored["id"], max_output_tokens=4)
    assert again["usage"]["input_tokens_details"]["cached_tokens"] > 0
    process.kill()


@pytest.mark.slow  # starts a server
def test_streams_that_do_not_end_are_ended(start: Start) -> None:
    """SIGTERM waits for `--drain-seconds` and no longer."""
    process, client = start("--drain-seconds", 1, "--max-tokens", 10**9)
    body = json.dumps({"prompt": "a", "max_tokens": 10**9, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with client.send(head + body) as running:
        assert running.recv(1000)
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=TIMEOUT)
        while running.recv(1 << 20):
            pass
    assert process.returncode == 0, log


@pytest.mark.slow  # starts two servers
def test_a_second_server_on_the_states_is_refused(
    start: Start, command: Callable[..., subprocess.Popen[str]], tiny_bundle: Path, tmp_path: Path
) -> None:
    start("--state-dir", tmp_path)
    other = command("serve", tiny_bundle, "--port", 0, "--state-dir", tmp_path)
    _, log = other.communicate(timeout=TIMEOUT)
    assert other.returncode == 1
    assert "another server uses the state folder" in log


REFUSED = {
    "no bundle": (("/nowhere",), "a bundle folder expected"),
    "port in use": ((), "cannot be listened on: Address already in use"),
    "no keys": (("--api-key-file", os.devnull), "has no keys"),
    "template": (("--chat-template", "bad.jinja"), "the chat template cannot be read"),
}


@pytest.mark.slow  # the same checks as those of other commands; each starts a process
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served(
    command: Callable[..., subprocess.Popen[str]], tiny_bundle: Path, tmp_path: Path, case: str
) -> None:
    options, message = REFUSED[case]
    (tmp_path / "bad.jinja").write_text("{% if %}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bundle = () if case == "no bundle" else (tiny_bundle,)
        port = taken.getsockname()[1] if case == "port in use" else 0
        process = command("serve", *bundle, *options, "--port", port, cwd=tmp_path)
        _, log = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    assert message in log


@pytest.mark.slow  # starts a server eight times
def test_what_was_acknowledged_survives_kill(start: Start, tmp_path: Path) -> None:
    """Clients store responses all the time; the process is killed; every response that was answered is there."""
    acknowledged: list[str] = []
    for _ in range(8):
        process, client = start("--state-dir", tmp_path)
        listed = {one["id"] for one in client.get("/v1/responses")["data"]}
        assert listed >= {*acknowledged}
        for name in acknowledged[-3:]:
            client.post("/v1/responses", input="x", previous_response_id=name, max_output_tokens=2)

        def store(client: Client = client) -> None:
            try:
                while True:
                    answer = client.post("/v1/responses", input="In the beginning", max_output_tokens=3)
                    acknowledged.append(answer["id"])
            except (OSError, ValueError, AssertionError):
                return

        clients = [threading.Thread(target=store) for _ in range(4)]
        for thread in clients:
            thread.start()
        goal = len(acknowledged) + 20
        while len(acknowledged) < goal:
            pass
        process.kill()
        for thread in clients:
            thread.join()
