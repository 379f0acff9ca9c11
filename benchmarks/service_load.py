"""Send the example service thousands of requests. Some clients hang up, or send garbage.

    python benchmarks/service_load.py build/megalodon-service artifacts/default-aoti-cpu

The script prints how many requests had each outcome, as the clients saw it and as the service counted it. It also
prints the service's resident memory on the way, and the sessions left at the end. The exit status is 1 if a session is
left, or if an answer is not what was asked for.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.service import Service, completion

PROMPTS = ["In the beginning", "And God said", "The LORD is my shepherd; I shall not want.", "x" * 300, "1"]
GARBAGE = [b"\x00\xff\x10garbage\r\n\r\n", b"{", b'{"prompt":[1,"a"]}', b'{"prompt":"x","max_tokens":-1}', b"[" * 5000]
KINDS = {"whole": 50, "streamed": 25, "hang up": 10, "half a request": 5, "garbage": 10}


def ask(service: Service, index: int) -> str:
    """Send one request, whose kind and contents are drawn with its index as seed; its kind and outcome."""
    dice = random.Random(index)
    kind = dice.choices(list(KINDS), list(KINDS.values()))[0]
    fields = {"prompt": dice.choice(PROMPTS), "max_tokens": dice.randint(1, 48), "seed": index, "ignore_eos": True}
    if kind == "whole":
        return f"{kind}: {_answer(service, fields)}"
    if kind == "streamed":
        with service.stream(**fields) as stream:
            *pieces, end = list(stream)
        count = sum(len(piece["choices"][0]["token_ids"]) for piece in pieces)
        return f"{kind}: {'as asked' if (end, count) == ('[DONE]', fields['max_tokens']) else 'WRONG'}"
    if kind == "hang up":
        with service.stream(**{**fields, "max_tokens": 4000}) as stream:
            for _ in range(dice.randint(0, 10)):
                next(stream)
        return kind
    if kind == "half a request":
        request = completion(**fields)
        service.send(request[: dice.randrange(1, len(request))]).close()
        return kind
    body = dice.choice(GARBAGE)
    if body.startswith(b"\x00"):
        with service.send(body) as connection:
            return f"{kind}: {connection.recv(100).split(b' ')[1].decode()}"
    return f"{kind}: {service.request('POST', '/v1/completions', body)[0]}"


def _answer(service: Service, fields: dict[str, Any]) -> str:
    status, body, _ = service.request("POST", "/v1/completions", json.dumps(fields).encode())
    if status != 200:
        return str(status)
    return "as asked" if len(json.loads(body)["choices"][0]["token_ids"]) == fields["max_tokens"] else "WRONG"


def main() -> int:
    """Send the requests, and print the outcomes; 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("program", type=Path, help="the built service")
    parser.add_argument("bundle", type=Path, help="the bundle that it serves")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=32)
    args = parser.parse_args()
    service = Service(args.program, args.bundle)
    seen: Counter[str] = Counter()
    lock = threading.Lock()
    started = time.monotonic()

    def resident() -> str:
        return f"{service.metrics()['process_resident_memory_bytes'] / 1e6:.1f} MB"

    def one(index: int) -> None:
        try:
            outcome = ask(service, index)
        except Exception as error:
            outcome = f"ERROR {type(error).__name__}: {error}"
        with lock:
            seen[outcome] += 1
            done = seen.total()
        if done in (1000, args.requests // 2):
            print(f"resident after {done} requests: {resident()}", flush=True)

    print(f"resident at the start: {resident()}", flush=True)
    with ThreadPoolExecutor(args.clients) as pool:
        list(pool.map(one, range(args.requests)))
    seconds = time.monotonic() - started
    time.sleep(1)  # the service needs a moment to notice the last clients that hung up
    metrics = service.metrics()
    print(f"resident at the end: {resident()}")
    print(f"{args.requests} requests from {args.clients} clients in {seconds:.1f} s")
    for outcome, count in sorted(seen.items()):
        print(f"  {count:6d}  {outcome}")
    print("counted by the service:", service.outcomes())
    tokens, steps = metrics["megalodon_generated_tokens_total"], metrics["megalodon_decode_steps_total"]
    print(
        f"{tokens:.0f} tokens in {steps:.0f} decode steps, {tokens / steps:.1f} a step; {tokens / seconds:.0f} tokens/s"
    )
    print(f"sessions left: {metrics['megalodon_sessions']:.0f}; queued: {metrics['megalodon_queued_requests']:.0f}")
    status = service.terminate()
    print(f"exit status after SIGTERM: {status}")
    wrong = any("WRONG" in outcome or "ERROR" in outcome for outcome in seen)
    return int(wrong or status != 0 or metrics["megalodon_sessions"] != 0)


if __name__ == "__main__":
    raise SystemExit(main())
