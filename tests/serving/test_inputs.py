"""Bad requests of every kind get one sentence in OpenAI's form, and never a 5xx; the server goes on."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from support.serving import Client

COMPLETION: dict[str, dict[str, Any]] = {
    "no prompt": {},
    "prompt": {"prompt": 5},
    "prompt of nothing": {"prompt": []},
    "mixed prompts": {"prompt": ["a", 5]},
    "mixed prompts of ids": {"prompt": [[1], "a"]},
    "prompt of floats": {"prompt": [1.5]},
    "prompt of bools": {"prompt": [True]},
    "prompt of objects": {"prompt": [{}]},
    "deep prompts": {"prompt": [[[1]]]},
    "unknown id": {"prompt": [257]},
    "negative id": {"prompt": [-1]},
    "huge id": {"prompt": [2**62]},
    "too many prompts": {"prompt": ["a"] * 513},
    "max_tokens": {"prompt": "a", "max_tokens": -1},
    "max_tokens beyond": {"prompt": "a", "max_tokens": 10**9},
    "max_tokens as text": {"prompt": "a", "max_tokens": "5"},
    "max_tokens of a fraction": {"prompt": "a", "max_tokens": 1.5},
    "temperature": {"prompt": "a", "temperature": -0.1},
    "temperature as text": {"prompt": "a", "temperature": "hot"},
    "temperature as bool": {"prompt": "a", "temperature": True},
    "top_p of 0": {"prompt": "a", "top_p": 0},
    "top_p": {"prompt": "a", "top_p": 1.1},
    "top_k": {"prompt": "a", "top_k": -2},
    "min_p": {"prompt": "a", "min_p": 2},
    "n of 0": {"prompt": "a", "n": 0},
    "n": {"prompt": "a", "n": 100},
    "seed": {"prompt": "a", "seed": "x"},
    "logprobs": {"prompt": "a", "logprobs": 21},
    "logprobs as bool": {"prompt": "a", "logprobs": True},
    "penalty": {"prompt": "a", "presence_penalty": 2.5},
    "repetition": {"prompt": "a", "repetition_penalty": 0},
    "tiny repetition": {"prompt": "a", "repetition_penalty": 5e-324},
    "bias key": {"prompt": "a", "logit_bias": {"x": 1}},
    "bias id": {"prompt": "a", "logit_bias": {"257": 1}},
    "bias id of digits": {"prompt": "a", "logit_bias": {"²": 1}},
    "bias": {"prompt": "a", "logit_bias": {"1": 101}},
    "bias list": {"prompt": "a", "logit_bias": [1]},
    "stop": {"prompt": "a", "stop": ""},
    "stops": {"prompt": "a", "stop": ["x"] * 17},
    "long stop": {"prompt": "a", "stop": "x" * 1025},
    "stop number": {"prompt": "a", "stop": 5},
    "stream": {"prompt": "a", "stream": "yes"},
    "stream_options": {"prompt": "a", "stream_options": {"other": 1}},
    "best_of": {"prompt": "a", "best_of": 2},
    "suffix": {"prompt": "a", "suffix": "b"},
    "unknown field": {"prompt": "a", "use_magic": True},
    "other model": {"prompt": "a", "model": "gpt-5"},
    "format": {"prompt": "a", "response_format": {"type": "xml"}},
    "format without schema": {"prompt": "a", "response_format": {"type": "json_schema"}},
    "wrong schema": {"prompt": "a", "response_format": {"type": "json_schema", "schema": {"type": "foo"}}},
    "remote schema": {"prompt": "a", "response_format": {"type": "json_schema", "schema": {"$ref": "http://x/y"}}},
    "huge schema": {"prompt": "a", "response_format": {"type": "json_schema", "schema": {"enum": ["x" * 70000]}}},
    "two formats": {"prompt": "a", "response_format": {"type": "text"}, "structured_outputs": {"regex": "a"}},
    "two outputs": {"prompt": "a", "structured_outputs": {"regex": "a", "json": {}}},
    "no output": {"prompt": "a", "structured_outputs": {}},
    "wrong regex": {"prompt": "a", "structured_outputs": {"regex": "("}},
    "wrong grammar": {"prompt": "a", "structured_outputs": {"grammar": "x"}},
    "empty choice": {"prompt": "a", "structured_outputs": {"choice": []}},
}
CHAT: dict[str, dict[str, Any]] = {
    "no messages": {},
    "empty messages": {"messages": []},
    "messages": {"messages": "hi"},
    "message": {"messages": ["hi"]},
    "no role": {"messages": [{"content": "hi"}]},
    "role": {"messages": [{"role": "tool", "content": "hi"}]},
    "role of another type": {"messages": [{"role": [], "content": "hi"}]},
    "no content": {"messages": [{"role": "user"}]},
    "content": {"messages": [{"role": "user", "content": 5}]},
    "image": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    "part": {"messages": [{"role": "user", "content": ["hi"]}]},
    "part without text": {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    "tool call": {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
    "tools": {"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]},
    "audio": {"messages": [{"role": "user", "content": "a"}], "modalities": ["audio"]},
    "top_logprobs alone": {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2},
    "top_logprobs": {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 21},
    "two limits": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "max_completion_tokens": 1},
    "prompt": {"messages": [{"role": "user", "content": "a"}], "prompt": "a"},
}
RESPONSE: dict[str, dict[str, Any]] = {
    "no input": {},
    "input": {"input": 5},
    "item": {"input": [5]},
    "item of another type": {"input": [{"type": "function_call", "role": "user", "content": "a"}]},
    "no tokens": {"input": "a", "max_output_tokens": 0},
    "previous": {"input": "a", "previous_response_id": "resp_0"},
    "previous path": {"input": "a", "previous_response_id": "../lock"},
    "metadata": {"input": "a", "metadata": {"a": 5}},
    "tools": {"input": "a", "tools": [{"type": "web_search"}]},
    "reasoning": {"input": "a", "reasoning": {"effort": "high"}},
    "text": {"input": "a", "text": {"verbosity": "low"}},
    "text format": {"input": "a", "text": {"format": 5}},
    "conversation": {"input": "a", "conversation": "x"},
    "background": {"input": "a", "background": True},
}
TOKENIZE: dict[str, dict[str, Any]] = {"nothing": {}, "both": {"prompt": "a", "messages": []}, "prompt": {"prompt": 5}}
DETOKENIZE: dict[str, dict[str, Any]] = {"none": {}, "ids": {"tokens": [257]}, "negative": {"tokens": [-1]}}
CASES = {
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": CHAT,
    "/v1/responses": RESPONSE,
    "/tokenize": TOKENIZE,
    "/detokenize": DETOKENIZE,
}
BODIES: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{",
    "not UTF-8": b'{"prompt": "\xff"}',
    "a list": b"[]",
    "a number": b"5",
    "twice": b'{"prompt": "a", "prompt": "b"}',
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "infinite": b'{"prompt": "a", "temperature": 1e999}',
    "huge number": b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    "deep": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "surrogate": b'{"prompt": "\\ud800"}',
    "mark": b'\xef\xbb\xbf{"prompt": "a"}',
}


def every_case() -> Iterator[Any]:
    for path, cases in CASES.items():
        yield from (pytest.param(path, fields, id=f"{path} {name}") for name, fields in cases.items())


def check(status: int, body: str, allowed: tuple[int, ...]) -> None:
    assert status in allowed, body
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 400


@pytest.mark.parametrize(("path", "fields"), every_case())
def test_wrong_fields(client: Client, path: str, fields: dict[str, Any]) -> None:
    for stream in ({}, {"stream": True}) if path.startswith("/v1") and "stream" not in fields else ({},):
        status, body, _ = client.request("POST", path, json.dumps({**fields, **stream}).encode())
        check(status, body, (400, 404))


@pytest.mark.parametrize("path", CASES)
@pytest.mark.parametrize("name", BODIES)
def test_wrong_bodies(client: Client, path: str, name: str) -> None:
    status, body, _ = client.request("POST", path, BODIES[name])
    check(status, body, (400,))


def test_the_refusal_names_the_field(client: Client) -> None:
    for fields, param in (
        ({"prompt": "a", "use_magic": 1}, "use_magic"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        ({}, "prompt"),
    ):
        _, body, _ = client.request("POST", "/v1/completions", json.dumps(fields).encode())
        error = json.loads(body)["error"]
        assert error["param"] == param
        assert param in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/responses/resp_0", 404),
        ("DELETE", "/v1/responses/resp_0", 404),
        ("GET", "/v1/responses/..%2F..%2Flock/state", 404),
        ("POST", "/v1/responses/state", 400),
        ("GET", "/%ff", 404),
    ],
)
def test_wrong_routes(client: Client, method: str, path: str, status: int) -> None:
    found, body, _ = client.request(method, path, b"" if method == "POST" else None)
    check(found, body, (status,))


def test_a_body_beyond_the_limit(small_limits: Client) -> None:
    status, body, _ = small_limits.request("POST", "/v1/completions", b" " * 70_000)
    check(status, body, (413,))
    status, body, _ = small_limits.request("POST", "/v1/completions", json.dumps({"prompt": "a" * 101}).encode())
    check(status, body, (400,))


def test_a_body_that_does_not_arrive(small_limits: Client) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
    with small_limits.send(head) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


GARBAGE = {
    "no HTTP": b"\x16\x03\x01\x00garbage\r\n\r\n",
    "no host line": b"GET\r\n\r\n",
    "long head": b"GET / HTTP/1.1\r\nA: " + b"a" * 200_000 + b"\r\n\r\n",
    "negative length": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n{}",
    "bad chunk": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage(client: Client, name: str) -> None:
    with client.send(GARBAGE[name]) as connection:
        connection.settimeout(10)
        try:
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(100)
        except OSError:  # the server has closed the connection already
            answer = b""
        assert not answer or answer.startswith(b"HTTP/1.1 4")
    assert client.get("/health") == {"status": "ok"}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_hanging_up_ends_the_stream(client: Client, path: str, stream: bool) -> None:
    prompt = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    fields = {"input": "a"} if path == "/v1/responses" else prompt
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    body = json.dumps({**fields, limit: 4096, "ignore_eos": True, "stream": stream}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    name = 'vllm:num_requests_running{model_name="small"}'
    with client.send(head + body) as connection:
        if stream:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        else:
            client.await_value(name, 1)
    client.await_value(name, 0)


def test_hanging_up_in_the_queue_and_in_the_body(client: Client) -> None:
    body = json.dumps({"prompt": "b" * 5000, "max_tokens": 4000, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    connections = [client.send(head + body[: len(body) - cut]) for cut in (0, 0, 0, 10, 4000) for _ in range(5)]
    for connection in connections:
        connection.close()
    for gauge in ("running", "waiting"):
        client.await_value(f'vllm:num_requests_{gauge}{{model_name="small"}}', 0)
    assert client.complete(prompt="a", max_tokens=1)["choices"]


def test_a_full_queue_is_429(small_limits: Client) -> None:
    busy = json.dumps({"prompt": "a", "max_tokens": 4096, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(busy)}\r\n\r\n".encode()
    with small_limits.send(head + busy) as running:
        assert running.recv(1000).startswith(b"HTTP/1.1 200")
        with small_limits.send(head + busy):
            small_limits.await_value('vllm:num_requests_waiting{model_name="small"}', 1)
            status, body, headers = small_limits.request("POST", "/v1/completions", busy)
            check(status, body, (429,))
            assert headers["Retry-After"] == "1"
