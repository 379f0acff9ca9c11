"""Load for a running server, and what its clients see: time to first token, inter-token latency, throughput, hits.

It speaks to the server over HTTP alone, with streamed completions, so it measures what users get.
"""

from __future__ import annotations

import http.client
import json
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

_TIMEOUT = 600.0  # seconds without a byte


@dataclass(frozen=True)
class Load:
    """What is sent. `shared_tokens` at the beginning of each prompt are the same in all of them."""

    url: str
    clients: int = 8
    requests: int = 64
    prompt_tokens: int = 128
    shared_tokens: int = 0
    max_tokens: int = 64
    temperature: float = 1.0
    seed: int = 0
    key: str | None = None


@dataclass
class Seen:
    """What one client saw of one request, in seconds and tokens."""

    first: float = 0.0
    total: float = 0.0
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0


def measure(load: Load) -> dict[str, Any]:
    """Send the load; the figures. OSError if the server cannot be reached, ValueError if it answers anything else."""
    size = _get(load, "/tokenizer_info")["vocab_size"]
    prompts = _prompts(load, size)
    started = time.perf_counter()
    with ThreadPoolExecutor(load.clients) as pool:
        seen = [*pool.map(lambda one: _complete(load, *one), enumerate(prompts))]
    seconds = time.perf_counter() - started
    tokens, prompted = sum(one.tokens for one in seen), sum(one.prompt_tokens for one in seen)
    return {
        "requests": load.requests,
        "clients": load.clients,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "time_to_first_token": _summary([one.first for one in seen]),
        "inter_token_latency": _summary([gap for one in seen for gap in one.gaps]),
        "request_latency": _summary([one.total for one in seen]),
        "tokens": tokens,
        "prompt_tokens": prompted,
        "hit_rate": sum(one.cached_tokens for one in seen) / max(prompted, 1),
    }


def table(report: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [
        f"{report['requests']} requests of {report['clients']} clients in {report['seconds']:.2f} s: "
        f"{report['tokens_per_second']:,.1f} tokens/s, {report['hit_rate']:.1%} of prompt tokens cached",
        f"{'':24}{'median':>12}{'p99':>12}",
    ]
    for name in ("time_to_first_token", "inter_token_latency", "request_latency"):
        figures = report[name]
        words = name.replace("_", " ")
        lines.append(f"{words:24}{figures['median'] * 1e3:>9.1f} ms{figures['p99'] * 1e3:>9.1f} ms")
    return "\n".join(lines)


def _prompts(load: Load, size: int) -> list[list[int]]:
    draw = random.Random(load.seed)
    shared = [draw.randrange(size) for _ in range(min(load.shared_tokens, load.prompt_tokens))]
    own = load.prompt_tokens - len(shared)
    return [shared + [draw.randrange(size) for _ in range(own)] for _ in range(load.requests)]


def _complete(load: Load, number: int, prompt: Sequence[int]) -> Seen:
    body = {
        **{"prompt": prompt, "max_tokens": load.max_tokens, "temperature": load.temperature, "seed": number},
        **{"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}},
        "return_token_ids": True,  # a chunk for each token, even where it is only a part of a character
    }
    seen, started = Seen(), time.perf_counter()
    last = started
    for chunk in _events(load, body):
        if "error" in chunk:
            raise ValueError(f"the server failed: {chunk['error']['message']}")
        now = time.perf_counter()
        if chunk["choices"]:
            if last == started:
                seen.first = now - started
            else:
                seen.gaps.append(now - last)
            last = now
        if chunk.get("usage"):
            usage = chunk["usage"]
            seen.tokens, seen.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
            seen.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
    seen.total = time.perf_counter() - started
    return seen


def _events(load: Load, body: dict[str, Any]) -> Iterator[Any]:
    connection = _connection(load)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), _headers(load))
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"the server answered {response.status}: {response.read(400).decode(errors='replace')}")
        for line in response:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                yield json.loads(line[6:])
    finally:
        connection.close()


def _get(load: Load, path: str) -> Any:
    connection = _connection(load)
    try:
        connection.request("GET", path, headers=_headers(load))
        response = connection.getresponse()
        content = response.read()
        if response.status != 200:
            raise ValueError(f"{load.url}{path} answered {response.status}, expected 200; is it a megalodon-export?")
        return json.loads(content)
    finally:
        connection.close()


def _headers(load: Load) -> dict[str, str]:
    return {} if load.key is None else {"Authorization": f"Bearer {load.key}"}


def _connection(load: Load) -> http.client.HTTPConnection:
    parts = urlsplit(load.url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{load.url} is no address of a server, expected http://HOST:PORT")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.hostname, parts.port, timeout=_TIMEOUT)


def _summary(values: list[float]) -> dict[str, float]:
    """Median and 99th percentile: the smallest value that this share of all does not exceed."""
    ordered = sorted(values) or [0.0]
    return {"median": ordered[(len(ordered) - 1) // 2], "p99": ordered[-(-len(ordered) * 99 // 100) - 1]}
