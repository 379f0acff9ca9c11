"""The example service: the same tokens as Python over HTTP, and what it does with clients that are wrong, or gone."""

from __future__ import annotations

import http.client
import json
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import megalodon_export
from support.service import TIMEOUT, Service, completion

pytestmark = pytest.mark.usefixtures("one_thread")

FOREVER = {"prompt": "And", "max_tokens": 1_000_000, "ignore_eos": True, "temperature": 1.0, "seed": 1}


@pytest.fixture(scope="module")
def python(tiny_bundle: Path) -> megalodon_export.Session:
    return megalodon_export.load(tiny_bundle)


# ---- what it answers -------------------------------------------------------------------------------------------------


def test_tokens_are_those_of_python(service: Service, python: megalodon_export.Session) -> None:
    # Prompts of all lengths at the same time: they join and leave the batch, and are fed in pieces beside each other.
    prompts = [[i * j % 251 for i in range(length)] for j, length in enumerate((1, 300, 32, 7, 120, 64, 99, 5, 200, 3))]
    fields = [{"prompt": ids, "max_tokens": 10 + 3 * i} for i, ids in enumerate(prompts)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        found = list(pool.map(lambda one: service.complete(**one, temperature=0, ignore_eos=True), fields))
    for one, answer in zip(fields, found, strict=True):
        python.reset()
        expected = list(python.generate_ids(one["prompt"], one["max_tokens"], eos_token_id=-1))
        assert answer["choices"][0]["token_ids"] == expected
        assert answer["choices"][0]["finish_reason"] == "length"
        counts = [len(one["prompt"]), len(expected)]
        assert [answer["usage"][f"{kind}_tokens"] for kind in ("prompt", "completion", "total")] == [
            *counts,
            sum(counts),
        ]


@pytest.mark.parametrize("stop", [[], ["e"], ["zz", "\n"]])
@pytest.mark.parametrize("seed", range(3))
def test_texts_are_those_of_python(
    service: Service, python: megalodon_export.Session, seed: int, stop: list[str]
) -> None:
    how: dict[str, Any] = {"temperature": 1.1, "top_p": 0.95, "top_k": 100, "min_p": 0.001, "seed": seed}
    python.reset()
    expected = "".join(python.generate("In the beginning", 60, stop, **how))
    answer = service.complete(prompt="In the beginning", max_tokens=60, stop=stop, **how)
    assert answer["choices"][0]["text"] == expected
    python.reset()
    full = "".join(python.generate("In the beginning", 60, **how))
    ended = len(list(full)) > len(expected) or len(answer["choices"][0]["token_ids"]) < 60
    assert answer["choices"][0]["finish_reason"] == ("stop" if ended else "length")


def test_a_stream_is_the_answer_in_pieces(service: Service) -> None:
    fields = {"prompt": "And the king", "max_tokens": 200, "seed": 5, "model": "mine", "ignore_eos": True}
    whole = service.complete(**fields)
    with service.stream(**fields) as stream:
        *pieces, end = list(stream)
    assert end == "[DONE]"
    choices = [piece["choices"][0] for piece in pieces]
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    token_ids = [token for choice in choices for token in choice["token_ids"]]
    assert token_ids == whole["choices"][0]["token_ids"]
    assert {choice["finish_reason"] for choice in choices[:-1]} <= {None}
    assert choices[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert pieces[-1]["usage"] == whole["usage"]
    assert {piece["model"] for piece in pieces} == {"mine"}
    assert len({piece["id"] for piece in pieces}) == 1
    assert len(pieces) > 1


def test_a_seed_is_chosen_and_told(service: Service, python: megalodon_export.Session) -> None:
    answers = [service.complete(prompt="x", max_tokens=20, ignore_eos=True) for _ in range(2)]
    assert answers[0]["seed"] != answers[1]["seed"]
    for answer in answers:
        python.reset()
        ids = list(python.generate_ids(list(b"x"), 20, eos_token_id=-1, temperature=1.0, seed=answer["seed"]))
        assert answer["choices"][0]["token_ids"] == ids


def test_an_empty_prompt_is_a_beginning(service: Service, python: megalodon_export.Session) -> None:
    python.reset()
    expected = "".join(python.generate("", 20))
    assert service.complete(prompt="", max_tokens=20, temperature=0)["choices"][0]["text"] == expected


def test_health_and_metrics(service: Service) -> None:
    before = service.metrics()
    service.complete(prompt=[1, 2, 3], max_tokens=7, ignore_eos=True)
    after = service.metrics()
    grown = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert grown.pop("megalodon_prompt_tokens_total") == 3
    assert grown.pop("megalodon_generated_tokens_total") == 7
    assert grown.pop("megalodon_decode_steps_total") == 6
    assert grown.pop('megalodon_requests_total{outcome="completed"}') == 1
    assert grown.pop("megalodon_first_token_seconds_count") == 1
    assert service.request("GET", "/health")[:2] == (200, '{"status":"ok"}\n')


# ---- clients that are wrong ------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[bytes, int, str]] = {
    "no JSON": (b"{", 400, "the body is not JSON"),
    "no UTF-8": (b'{"prompt":"\xff"}', 400, "the body is not UTF-8 at byte 11"),
    "no object": (b"[1]", 400, "the body is array, expected a JSON object"),
    "nested": (b"[" * 5000, 400, "nested too deep"),
    "no prompt": (b"{}", 400, "there is no prompt, expected a string or a list of token ids"),
    "another prompt": (b'{"prompt":{"a":1}}', 400, 'prompt is {"a":1}, expected a string or'),
    "no ids": (b'{"prompt":[1,"a"]}', 400, 'prompt[1] is "a", expected a whole number in 0..256'),
    "an id of no token": (b'{"prompt":[257]}', 400, "prompt[0] is 257, expected a whole number in 0..256"),
    "unknown": (b'{"prompt":"x","max_token":1}', 400, 'the field "max_token" is unknown'),
    "unsupported": (b'{"prompt":"x","n":2}', 400, "n is 2, which is not supported, expected 1"),
    "no number": (b'{"prompt":"x","temperature":"1"}', 400, 'temperature is "1", expected a number'),
    "no integer": (b'{"prompt":"x","max_tokens":1.5}', 400, "max_tokens is 1.5, expected a whole number in 1..1000000"),
    "no flag": (b'{"prompt":"x","stream":1}', 400, "stream is 1, expected true or false"),
    "no tokens": (b'{"prompt":"x","max_tokens":0}', 400, "max_tokens is 0, expected a whole number in 1..1000000"),
    "too many tokens": (
        b'{"prompt":"x","max_tokens":1000001}',
        400,
        "max_tokens is 1000001, expected a whole number in 1..",
    ),
    "temperature": (b'{"prompt":"x","temperature":-1}', 400, "temperature is -1.0, expected a finite number >= 0"),
    "top_p": (b'{"prompt":"x","top_p":1.5}', 400, "top_p is 1.5, expected a number in (0, 1]"),
    "seed": (b'{"prompt":"x","seed":-1}', 400, "seed is -1, expected a whole number in 0..18446744073709551615"),
    "stop": (b'{"prompt":"x","stop":[""]}', 400, 'stop has "", expected strings of 1..256 bytes'),
    "a long prompt": (b'{"prompt":"%s"}' % (b"x" * 1001), 413, "the prompt has 1001 tokens, expected at most 1000"),
    "a long body": (b'{"prompt":"%s"}' % (b"x" * 20_001), 413, "the body is larger than 20000 bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_named(service: Service, name: str) -> None:
    body, expected, message = REFUSED[name]
    refused = service.outcomes()["refused"]
    status, answer, _ = service.request("POST", "/v1/completions", body)
    assert (status, json.loads(answer)["error"]["code"]) == (expected, expected)
    assert message in json.loads(answer)["error"]["message"]
    assert service.outcomes()["refused"] == refused + 1


def test_a_body_of_unknown_length_is_bounded(service: Service) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=TIMEOUT)
    connection.request("POST", "/v1/completions", iter([b"x" * 10_000] * 3), encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_other_paths_and_methods(service: Service) -> None:
    for method, path in (("GET", "/"), ("POST", "/v1/chat/completions"), ("PUT", "/health"), ("DELETE", "/metrics")):
        status, answer, _ = service.request(method, path, b"x" if method != "GET" else None)
        assert status == 404
        assert "POST /v1/completions, GET /health and GET /metrics" in answer
    with service.send(b"\x00\xff garbage\r\n\r\n") as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 400 Bad Request\r\n")


def test_a_full_queue_says_when_to_come_back(start: Callable[..., Service]) -> None:
    service = start("--streams", 1, "--queue", 1, "--max-new-tokens", 1_000_000, "--drain-seconds", 0)
    with service.stream(**FOREVER) as first:
        next(first)
        with service.send(completion(**FOREVER)):
            service.await_value("megalodon_queued_requests", 1)
            status, answer, headers = service.request("POST", "/v1/completions", json.dumps(FOREVER).encode())
            assert (status, headers["Retry-After"]) == (503, "1")
            assert "try again later" in answer
        service.await_value("megalodon_queued_requests", 0)  # the one that waited has hung up
    service.await_value("megalodon_sessions", 0)
    assert service.outcomes() == {"completed": 0, "cancelled": 2, "failed": 0, "refused": 0, "busy": 1}
    assert service.terminate() == 0


# ---- clients that are gone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_hang_up_frees_the_session(service: Service, stream: bool) -> None:
    cancelled = service.outcomes()["cancelled"]
    connection = service.send(completion(**FOREVER, stream=stream))
    service.await_value("megalodon_sessions", 1)
    connection.close()
    service.await_value("megalodon_sessions", 0)
    assert service.outcomes()["cancelled"] == cancelled + 1


def test_others_do_not_notice_a_hang_up(service: Service) -> None:
    fields = {"prompt": "And God", "max_tokens": 150, "seed": 3, "ignore_eos": True}
    expected = service.complete(**fields)["choices"][0]["token_ids"]
    with ThreadPoolExecutor(1) as pool, ExitStack() as others:
        streams = [others.enter_context(service.stream(**FOREVER)) for _ in range(3)]
        for stream in streams:
            next(stream)
        answer = pool.submit(service.complete, **fields)
        others.close()
        assert answer.result()["choices"][0]["token_ids"] == expected


def test_half_a_request_holds_nothing(service: Service) -> None:
    service.await_value("megalodon_sessions", 0)  # those whose clients hung up a moment ago
    with service.send(completion(**FOREVER)[:-10]):
        assert service.metrics()["megalodon_sessions"] == 0
    service.send(b"POST /v1/completions HTTP/1.1\r\nContent-Le").close()
    service.complete(prompt="x", max_tokens=1)


# ---- its end ---------------------------------------------------------------------------------------------------------


def test_sigterm_lets_requests_end(start: Callable[..., Service]) -> None:
    service = start("--max-new-tokens", 1_000_000)
    with service.stream(**{**FOREVER, "max_tokens": 3000}) as stream:
        next(stream)
        service.process.terminate()
        *pieces, end = list(stream)
    assert end == "[DONE]"
    assert pieces[-1]["usage"]["completion_tokens"] == 3000
    assert service.process.wait(TIMEOUT) == 0


def test_sigterm_ends_what_does_not_end(start: Callable[..., Service]) -> None:
    service = start("--max-new-tokens", 1_000_000, "--drain-seconds", 3)
    with service.stream(**FOREVER) as stream:
        next(stream)
        service.process.terminate()
        while (health := service.request("GET", "/health"))[0] == 200:  # the signal is on its way
            time.sleep(0.01)
        assert (health[0], "shutting down" in health[1]) == (503, True)
        status, answer, _ = service.request("POST", "/v1/completions", b'{"prompt":"x"}')
        assert (status, "shutting down" in answer) == (503, True)
        *_, last = stream
        assert last["error"]["message"] == "the service is shutting down"
    assert service.process.wait(TIMEOUT) == 0


def test_a_whole_answer_that_failed_has_the_status_of_a_failure(start: Callable[..., Service]) -> None:
    service = start("--max-new-tokens", 1_000_000, "--drain-seconds", 0)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(service.request, "POST", "/v1/completions", json.dumps(FOREVER).encode())
        service.await_value("megalodon_sessions", 1)
        assert service.terminate() == 0
        status, body, headers = answer.result()
    assert (status, headers["Retry-After"]) == (503, "1")
    assert json.loads(body)["error"]["message"] == "the service is shutting down"


def test_what_cannot_start_says_why(cpp_build: Path, service: Service, tiny_bundle: Path, tmp_path: Path) -> None:
    def fails(*arguments: object) -> str:
        command = [str(cpp_build / "megalodon-service"), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
        assert done.returncode == 1
        return done.stderr

    assert "a bundle folder expected, nothing found" in fails(tmp_path / "absent")
    assert f":{service.port} cannot be bound" in fails(tiny_bundle, "--port", service.port)
