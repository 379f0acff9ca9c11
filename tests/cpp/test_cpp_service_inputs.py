"""What reaches the example service: numbers of any size, faults of single streams, HTTP of any kind, options."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import megalodon_export
from support.native import CPP, sh
from support.service import TIMEOUT, Service, answers, completion

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def python(tiny_bundle: Path) -> megalodon_export.Session:
    return megalodon_export.load(tiny_bundle)


def error_of(answer: str) -> str:
    """The message of an error, which has the form that OpenAI's clients read."""
    error = json.loads(answer)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    message: str = error["message"]
    return message


# ---- numbers, and fields of a request --------------------------------------------------------------------------------

RANGES = {"max_tokens": "1..1000000", "top_k": f"0..{2**63 - 1}", "seed": f"0..{2**64 - 1}", "prompt[1]": "0..256"}
NO_WHOLE_NUMBERS = {"-1": "-1", str(-(2**63)): str(-(2**63)), str(-(2**63) - 1): "-9.223372036854776e+18"} | {
    **{str(2**64): "1.8446744073709552e+19", "3.0": "3.0", "1e2": "100.0", "1.5": "1.5", "-0.0": "-0.0"},
    **{"true": "true", '"3"': '"3"', "[3]": "[3]", "{}": "{}"},
}


def _refused_numbers() -> list[tuple[str, str, str]]:
    """Each field, what it is sent as, and how the refusal shows that."""
    cases = [(field, sent, shown) for field in RANGES for sent, shown in NO_WHOLE_NUMBERS.items()]
    cases += [(field, str(2**64 - 1), str(2**64 - 1)) for field in RANGES if field != "seed"]
    cases += [(field, str(2**63), str(2**63)) for field in RANGES if field != "seed"]
    return [*cases, ("prompt[1]", "null", "null"), ("prompt[1]", "257", "257"), ("max_tokens", "0", "0")]


@pytest.mark.parametrize(("field", "sent", "shown"), _refused_numbers())
def test_a_number_is_refused_as_it_stands(service: Service, field: str, sent: str, shown: str) -> None:
    body = f'{{"prompt": [1, {sent}]}}' if field == "prompt[1]" else f'{{"prompt": "x", "{field}": {sent}}}'
    status, answer, _ = service.request("POST", "/v1/completions", body.encode())
    assert status == 400
    assert error_of(answer) == f"{field} is {shown}, expected a whole number in {RANGES[field]}"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"prompt": "x", "max_tokens": 1, "prompt": "y"}', 'the field "prompt" is there twice; send it once'),
        (b'{"prompt": "x", "logit_bias": {"1": 2, "1": 3}}', 'the field "1" is there twice; send it once'),
        (b'{"prompt": "x", "temperature": 1e400}', "the body is not JSON: "),
        (b'{"prompt": "x", "temperature": NaN}', "the body is not JSON: "),
        (b'{"prompt": "\\ud800"}', "the body is not JSON: "),
        (b'{"prompt": "x", "stop": ["a", "\xe2\x28"]}', "the body is not UTF-8 at byte 31"),
        ('{"prompt": "é'.encode() + b'\xff"}', "the body is not UTF-8 at byte 14"),
        (b'{"prompt": "x", "stream_options": {"include_usage": true}}', 'stream_options is {"include_usage":true}, '),
        (b"", "the body is not JSON: "),
    ],
)
def test_a_body_is_refused_in_words(service: Service, body: bytes, message: str) -> None:
    status, answer, _ = service.request("POST", "/v1/completions", body)
    assert status == 400
    assert error_of(answer).startswith(message)


def test_null_is_none(service: Service) -> None:
    names = ("max_tokens", "seed", "stop", "stream", "stream_options", "logprobs", "user", "temperature")
    service.complete(prompt="x", **dict.fromkeys(names))


# ---- one stream's fault ----------------------------------------------------------------------------------------------

LONG = [[(i + j) * 37 % 199 for i in range(300)] for j in range(4)]  # fed side by side, in many pieces


def _complete(service: Service, prompt: list[int], **fields: Any) -> tuple[int, str]:
    asked = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **fields}
    return service.request("POST", "/v1/completions", json.dumps(asked).encode())[:2]


def _all_but_the_guilty(service: Service, python: megalodon_export.Session, bad: int, message: str) -> None:
    """Requests at the same time, the prompt of one of which ends with a bad token: the others do not notice."""
    failed = service.outcomes()["failed"]
    with ThreadPoolExecutor(5) as pool:
        *good, guilty = pool.map(lambda prompt: _complete(service, prompt), [*LONG, [*LONG[0][:-1], bad]])
    assert (guilty[0], message in error_of(guilty[1])) == (500, True)
    for prompt, (status, answer) in zip(LONG, good, strict=True):
        python.reset()
        expected = list(python.generate_ids(prompt, 12, eos_token_id=-1))
        assert (status, json.loads(answer)["choices"][0]["token_ids"]) == (200, expected)
    assert service.outcomes()["failed"] == failed + 1


@pytest.fixture(scope="module")
def nan_service(start: Callable[..., Service], nan_bundle: Path) -> Service:
    return start("--no-hashes", "--prefill-tokens", 100, bundle=nan_bundle)


def test_a_prompt_without_logits_fails_alone(nan_service: Service, python: megalodon_export.Session) -> None:
    _all_but_the_guilty(nan_service, python, 200, "cannot be sampled: NaN in 257 of 257 logits")


def test_a_stream_that_fails_midway_ends_with_an_error(nan_service: Service, python: megalodon_export.Session) -> None:
    how: dict[str, Any] = {"temperature": 1.0, "seed": 0}
    until: list[int] = []
    while 200 not in until[1:-1]:  # the stream chooses the token itself, and fails when it is fed
        how["seed"] += 1
        python.reset()
        until = list(python.generate_ids([7], 100, eos_token_id=-1, **how))
    del until[until.index(200) + 1 :]
    fields = {"prompt": [7], "max_tokens": 100, "ignore_eos": True, **how}
    failed = nan_service.outcomes()["failed"]
    with ThreadPoolExecutor(1) as pool, nan_service.stream(**fields) as stream:
        other = pool.submit(_complete, nan_service, LONG[1])
        *pieces, last = list(stream)
        status, answer = other.result()
    assert [token for piece in pieces for token in piece["choices"][0]["token_ids"]] == until
    assert {piece["choices"][0]["finish_reason"] for piece in pieces} == {None}
    assert "cannot be sampled" in last["error"]["message"]
    python.reset()
    assert (status, json.loads(answer)["choices"][0]["token_ids"]) == (
        200,
        list(python.generate_ids(LONG[1], 12, eos_token_id=-1)),
    )
    assert _complete(nan_service, **fields)[0] == 500  # as a whole
    assert nan_service.outcomes()["failed"] == failed + 2


# Calls for several streams fail after they have fed them. A call with token 201 always fails.
FAULTS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <megalodon.h>
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
static int calls = 0;
static int is_bad(const int64_t* ids, size_t count) {
  for (size_t i = 0; i < count; ++i) if (ids[i] == 201) return 1;
  return 0;
}
const char* megalodon_last_error(void) { return "injected"; }
megalodon_status megalodon_prefill_batch(megalodon_session* const* sessions, const int64_t* const* ids,
                                         const size_t* lengths, size_t count, float* logits) {
  megalodon_status status = REAL(megalodon_prefill_batch)(sessions, ids, lengths, count, logits);
  for (size_t i = 0; i < count; ++i) if (is_bad(ids[i], lengths[i])) return MEGALODON_FAILED;
  return count > 1 && ++calls % 3 == 0 ? MEGALODON_OUT_OF_MEMORY : status;
}
megalodon_status megalodon_step_batch(megalodon_session* const* sessions, const int64_t* ids, size_t count,
                                      const megalodon_sampling* samplings, const uint64_t* indices, int64_t* next) {
  megalodon_status status = REAL(megalodon_step_batch)(sessions, ids, count, samplings, indices, next);
  if (count < 2 || ++calls % 5 != 0) return status;
  for (size_t i = 0; i < count; ++i) next[i] = -1;
  return MEGALODON_FAILED;
}
megalodon_status megalodon_session_prefill(megalodon_session* session, const int64_t* ids, size_t count,
                                           float* logits) {
  return is_bad(ids, count) ? MEGALODON_FAILED : REAL(megalodon_session_prefill)(session, ids, count, logits);
}
"""


def test_streams_go_on_after_a_failed_call(
    start: Callable[..., Service], python: megalodon_export.Session, tmp_path: Path
) -> None:
    (tmp_path / "faults.c").write_text(FAULTS)
    sh("cc", "-shared", "-fPIC", f"-I{CPP / 'include'}", tmp_path / "faults.c", "-o", tmp_path / "faults.so", "-ldl")
    service = start("--prefill-tokens", 100, LD_PRELOAD=str(tmp_path / "faults.so"))
    for _ in range(3):
        _all_but_the_guilty(service, python, 201, "injected")
    service.await_value("megalodon_sessions", 0)


# ---- HTTP ------------------------------------------------------------------------------------------------------------

FIELDS: dict[str, Any] = {"prompt": "And the king", "max_tokens": 30, "seed": 5, "ignore_eos": True}


def _text(answer: str) -> str:
    """The text of an answer, whole or streamed."""
    if answer.startswith("data: "):
        *events, end = re.findall(r"data: (.*)\n\n", answer)
        assert end == "[DONE]"
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)
    text: str = json.loads(answer)["choices"][0]["text"]
    return text


@pytest.fixture(scope="module")
def expected(service: Service) -> str:
    text: str = service.complete(**FIELDS)["choices"][0]["text"]
    return text


@pytest.mark.parametrize("stream", [False, True])
def test_an_http_1_0_client(service: Service, expected: str, stream: bool) -> None:
    with service.send(completion("1.0", **FIELDS, stream=stream)) as connection:
        ((status, answer, headers),) = answers(connection, 1)
        assert (status, _text(answer)) == (200, expected)
        assert headers["Transfer-Encoding"] is None
        assert headers["Connection"] == "close"
        assert (headers["Content-Length"] is None) == stream
        assert connection.recv(1) == b""


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_has_ended_its_side(service: Service, expected: str, stream: bool, version: str) -> None:
    with service.send(completion(version, **FIELDS, stream=stream)) as connection:
        connection.shutdown(socket.SHUT_WR)
        ((status, answer, _),) = answers(connection, 1)
        assert (status, _text(answer)) == (200, expected)
        assert connection.recv(1) == b""


def test_requests_before_their_answers(service: Service, expected: str) -> None:
    other = {**FIELDS, "prompt": "In the beginning"}
    health = b"GET /health HTTP/1.1\r\n\r\n"
    sent = completion(**FIELDS) + health + completion(**other, stream=True) + health * 50
    with service.send(sent) as connection:
        first, second, third, *others = answers(connection, 53)
    assert _text(first[1]) == expected
    assert _text(third[1]) == service.complete(**other)["choices"][0]["text"]
    assert {answer[:2] for answer in (second, *others)} == {(200, '{"status":"ok"}\n')}


@pytest.mark.parametrize("value", ["bytes=0-10", "bytes=5-", "bytes=9-3", "lines=1", "x"])
def test_ranges_are_ignored(service: Service, expected: str, value: str) -> None:
    status, answer, headers = service.request("POST", "/v1/completions", json.dumps(FIELDS).encode(), Range=value)
    assert (status, _text(answer), headers["Content-Range"]) == (200, expected, None)
    assert service.request("GET", "/health", Range=value)[:2] == (200, '{"status":"ok"}\n')


POST = "POST /v1/completions HTTP/1.1\r\n"
NO_REQUESTS: dict[str, tuple[str, int, str]] = {
    "a long path": (f"GET /{'x' * 9000} HTTP/1.1\r\n\r\n", 414, "the first line is longer than 8192 bytes"),
    "long headers": (POST + "X: y\r\n" * 6000 + "\r\n", 431, "the headers are longer than 32768 bytes"),
    "gzip": (POST + "Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\nxx", 415, "the body is compressed"),
    "another transfer": (POST + "Transfer-Encoding: gzip\r\n\r\n", 501, "Transfer-Encoding is unknown"),
    "another expectation": (POST + "Expect: more\r\n\r\n", 417, "the expectation is unknown"),
    "HTTP/2": ("PRI * HTTP/2.0\r\n\r\n", 505, "the version is unknown, expected HTTP/1.1"),
    "two lengths": (
        POST + "Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
        400,
        "the Content-Length is not a number",
    ),
    "a length and chunks": (
        POST + "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        400,
        "a chunked body has no Content-Length",
    ),
    "a negative length": (POST + "Content-Length: -1\r\n\r\n", 400, "the Content-Length is not a number"),
    "a length of 2^64": (POST + f"Content-Length: {2**64}\r\n\r\n", 400, "the Content-Length is not a number"),
    "a large length": (POST + f"Content-Length: {2**64 - 1}\r\n\r\n", 413, "the body is larger than 20000 bytes"),
    "a large chunk": (
        POST + "Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
        413,
        "the body is larger than 20000 bytes",
    ),
    "no chunk": (POST + "Transfer-Encoding: chunked\r\n\r\nxyz\r\n", 400, "the size of a chunk is not a number"),
    "a longer chunk": (POST + "Transfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n", 400, "a chunk of the body is longer"),
    "a header of two lines": (POST + "X: y\r\n z\r\n\r\n", 400, "a header is not NAME: VALUE"),
    "LF alone": ("GET /health HTTP/1.1\n\n", 400, "lines end with LF, expected CR LF"),
    "no HTTP": ("hello\r\n\r\n", 400, "the request is not HTTP"),
}


@pytest.mark.parametrize("name", NO_REQUESTS)
def test_what_is_no_request_is_told_why(service: Service, name: str) -> None:
    sent, status, message = NO_REQUESTS[name]
    refused = service.outcomes()["refused"]
    with service.send(sent.encode()) as connection:
        ((found, answer, headers),) = answers(connection, 1)
        assert (found, headers["Connection"]) == (status, "close")
        assert error_of(answer).startswith(message)
        assert connection.recv(1) == b""
    assert service.outcomes()["refused"] == refused + 1


def test_a_body_in_chunks(service: Service, expected: str) -> None:
    head, body = completion(**FIELDS).split(b"\r\n\r\n")
    chunks = b"".join(
        b"%x;name=value\r\n%s\r\n" % (len(body[i : i + 7]), body[i : i + 7]) for i in range(0, len(body), 7)
    )
    sent = re.sub(rb"Content-Length: \d+", b"Transfer-Encoding: chunked", head) + b"\r\n\r\n" + chunks + b"0\r\n\r\n"
    with service.send(sent * 2) as connection:
        assert [_text(answer) for _, answer, _ in answers(connection, 2)] == [expected] * 2


def test_a_client_that_waits_to_continue(service: Service, expected: str) -> None:
    head, body = completion(**FIELDS).split(b"\r\n\r\n")
    with service.send(head + b"\r\nExpect: 100-continue\r\n\r\n") as connection:
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert _text(answers(connection, 1)[0][1]) == expected


def test_a_connection_serves_many_requests_until_it_is_told_to_close(service: Service) -> None:
    with service.send(b"") as connection:
        for _ in range(3):
            connection.sendall(b"GET /health HTTP/1.1\r\n\r\n")
            assert answers(connection, 1)[0][0] == 200
        connection.sendall(b"HEAD /health HTTP/1.1\r\nConnection: close\r\n\r\n")
        *_, end = connection.makefile("rb").read().split(b"\r\n")
        assert end == b""  # no body


def test_idle_connections_delay_nobody(service: Service) -> None:
    with ExitStack() as stack:
        idle = [stack.enter_context(service.send(b"")) for _ in range(150)]
        idle += [stack.enter_context(service.send(b"POST /v1/completions HTT")) for _ in range(150)]
        assert service.request("GET", "/health")[0] == 200
        for connection in idle:  # all are still open: the answer did not wait for their end
            connection.setblocking(False)
            with pytest.raises(BlockingIOError):
                connection.recv(1)


@pytest.mark.slow
def test_half_a_request_is_not_awaited_for_ever(service: Service) -> None:
    """Slow, because it waits as long as the service does. An idle connection ends in silence."""
    with service.send(b"") as idle, service.send(completion(**FIELDS)[:-5]) as half:
        ((status, answer, _),) = answers(half, 1)
        assert (status, error_of(answer)) == (408, "the request did not arrive in time; send all of it at once")
        assert idle.recv(1) == b""


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        *(("--port", value, "0..65535") for value in ("70000", "65536", "-1", "http")),
        *(("--max-new-tokens", value, f"1..{2**31 - 1}") for value in ("0", "-1")),
        *(("--max-prompt-tokens", value, f"1..{2**31 - 1}") for value in ("0", "-1")),
        *(("--max-body-bytes", value, f"1..{2**31 - 1}") for value in ("-1", str(2**64 - 1))),
        *((option, value, "1..4096") for option in ("--streams", "--queue") for value in ("0", "4097")),
        *(("--prefill-tokens", value, "1..1048576") for value in ("0",)),
        *(("--drain-seconds", value, "0..3600") for value in ("-1", "nan")),
    ],
)
def test_an_option_names_its_range(cpp_build: Path, option: str, value: str, expected: str) -> None:
    command = [str(cpp_build / "megalodon-service"), "/nowhere", option, value]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{option} is {value}, expected {expected}\n")
