"""Random histories: whatever clients do, answers are a session's, and nothing is left behind."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megalodon_export.runtimes import Runtime
from megalodon_export.serving.engine import Engine
from megalodon_export.serving.state_store import StateStore
from support.serving import Client, Reader, request

KINDS = ("whole", "whole", "cancelled", "forked", "continued")


def check_empty(engine: Engine) -> None:
    """No stream runs or waits, no cursor holds the tree, and the budgets are what the states take."""
    assert engine.drain(60)
    assert (engine.running, engine.waiting) == (0, 0)
    tree, store = engine._tree, engine.store
    assert tree is not None
    left, sizes = [*tree._roots.values()], 0
    while left:
        node = left.pop()
        left += node.children.values()
        assert node.users == 0
        assert not node.is_empty
        kept = [*([node.kept] if node.kept else []), *(one for tails in node.tails.values() for one in tails.values())]
        sizes += sum(one.size for one in kept)
    assert sizes == sum(store.used)
    assert all(used <= budget for used, budget in zip(store.used, store.budgets, strict=True))


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.slow if seed else ()) for seed in range(25)])
def test_a_random_history(
    seed: int, runtime: Runtime, engine: Callable[..., Engine], alone: Callable[..., list[int]], tmp_path: Path
) -> None:
    """Streams of every kind that begin, hang up and end at random, while states move to the disk and are forgotten."""
    draw = random.Random(seed)
    cpu = torch.device("cpu")
    memory, disk = draw.choice([40_000, 150_000, 10**7]), draw.choice([0, 100_000, 10**7])
    store = StateStore(runtime.config, cpu, memory, 0, tmp_path, disk)
    one = engine(streams=draw.choice([2, 5, 8]), piece=draw.choice([16, 64, 256]), store=store)
    prompts = [[5] * 64, [*range(100)], [*range(70)], [9]]
    running: list[tuple[str, Reader, list[int], dict[str, Any]]] = []
    for _ in range(30):
        kind = draw.choice(KINDS)
        prompt = [*draw.choice(prompts), *draw.choices(range(256), k=draw.choice([0, 1, 3, 60]))]
        fields: dict[str, Any] = draw.choice([{}, {"temperature": 1.0, "seed": draw.randrange(2**64)}])
        count = draw.randrange(1, 30)
        reader = Reader(one, request(prompt, count, n=2 if kind == "forked" else 1, keep_state=True, **fields))
        running.append((kind, reader, prompt, {"count": count, **fields}))
        prompts.append(prompt)
        if kind == "cancelled":
            reader.streams[0].cancel()
            one.wake()
    for kind, reader, prompt, fields in running:
        if kind == "cancelled":
            continue
        count = fields.pop("count")
        answers = reader.wait()
        for index, answer in enumerate(answers):
            own = {**fields, "seed": (fields["seed"] + index) % 2**64} if fields else {}
            assert answer.ids == alone(prompt, count, **own), answer.error
        if kind == "continued":
            last = answers[0].last
            (more,) = Reader(one, request([3, 1], 5, state=last.state, pending=last.pending)).wait()
            assert more.ids == alone([*prompt, *answers[0].ids, 3, 1], 5)
    check_empty(one)
    assert len([*tmp_path.iterdir()]) == len(store._levels[2])


def _send(client: Client, draw: random.Random, failures: list[str]) -> None:
    """One request of a client that may hang up anywhere, be slow, or send garbage."""
    path = draw.choice(["/v1/completions", "/v1/chat/completions", "/v1/responses"])
    text = draw.choice(["In the beginning", "a" * 200, "b" * 90]) + str(draw.randrange(3))
    fields: dict[str, Any] = {"stream": draw.random() < 0.7, "ignore_eos": True, "seed": draw.randrange(100)}
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    fields[limit] = draw.randrange(1, 40)
    fields |= {
        "/v1/completions": {"prompt": text},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": text}]},
        "/v1/responses": {"input": text, "store": draw.random() < 0.5},
    }[path]
    body = json.dumps(fields).encode()
    if draw.random() < 0.1:
        body = bytes(draw.choices(range(256), k=50))
    data = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    )
    cut = draw.choice([len(data)] * 5 + [draw.randrange(len(data))])
    try:
        with client.send(data[:cut]) as connection:
            if cut < len(data) or draw.random() < 0.3:
                connection.recv(draw.choice([1, 300])) if cut == len(data) and draw.random() < 0.5 else None
                return
            answer = b""
            while received := connection.recv(1 << 16):
                answer += received
    except OSError as error:
        failures.append(repr(error))
        return
    status = int(answer.split(b" ", 2)[1])
    if status not in (200, 400, 429) or (status == 200 and b'"error":{' in answer):
        failures.append(answer[:500].decode(errors="replace"))


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_clients_that_misbehave_harm_nobody(serve: Callable[..., Client], count: int) -> None:
    """Hang-ups in every phase, garbage, and honest clients beside them; 100 connections that send nothing."""
    client = serve(streams=4, queue=8)
    idle = [socket.create_connection(("127.0.0.1", client.port)) for _ in range(100)]
    expected = client.complete(prompt="honest", max_tokens=12, seed=5)["choices"]
    failures: list[str] = []
    numbers = iter(range(count))

    def misbehave(seed: int) -> None:
        draw = random.Random(seed)
        for _ in numbers:
            _send(client, draw, failures)

    threads = [threading.Thread(target=misbehave, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    honest = 0
    while any(thread.is_alive() for thread in threads):
        status, body, _ = client.request(
            "POST", "/v1/completions", json.dumps({"prompt": "honest", "max_tokens": 12, "seed": 5}).encode()
        )
        assert status in (200, 429), body
        if status == 200:
            assert json.loads(body)["choices"] == expected
            honest += 1
    for thread in threads:
        thread.join()
    for connection in idle:
        connection.close()
    assert failures == []
    for gauge in ("running", "waiting"):
        client.await_value(f'vllm:num_requests_{gauge}{{model_name="small"}}', 0)
    assert client.complete(prompt="honest", max_tokens=12, seed=5)["choices"] == expected


def test_a_slow_reader_holds_up_nobody(client: Client) -> None:
    """It reads nothing while others are answered, and then has all of its text."""
    fields = {"prompt": "slow", "max_tokens": 600, "ignore_eos": True, "seed": 4}
    body = json.dumps({**fields, "stream": True, "return_token_ids": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with slow:
        slow.connect(("127.0.0.1", client.port))
        slow.sendall(head.encode() + body)
        for seed in range(5):
            assert client.complete(prompt="quick", max_tokens=5, ignore_eos=True, seed=seed)["choices"]
        client.await_value('vllm:num_requests_running{model_name="small"}', 0)
        received = b""
        while data := slow.recv(1 << 16):
            received += data
    ids = [json.loads(line[6:])["choices"][0]["token_ids"] for line in received.splitlines() if line[:7] == b"data: {"]
    assert sum(map(len, ids)) == 600
    assert received.rstrip().endswith(b"0")
    assert b"data: [DONE]" in received


@pytest.mark.slow  # two thousand sockets
def test_two_thousand_idle_connections_hold_up_nobody(client: Client) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(10_000, hard), hard))
    try:
        idle = [socket.create_connection(("127.0.0.1", client.port)) for _ in range(2000)]
        assert client.complete(prompt="a", max_tokens=5, ignore_eos=True)["usage"]["completion_tokens"] == 5
        for connection in idle:
            connection.close()
        assert client.get("/health") == {"status": "ok"}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
