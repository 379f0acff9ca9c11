"""The serving engine beside the bare decode program: tokens a second, and what the engine adds to a step.

    python benchmarks/serve_engine.py BUNDLE [--batch 1 --batch 64] [--tokens 256] [--temperature 1]

It needs no server. `bare` steps the program with fixed tokens and waits for each step, `engine` runs as many streams
through `megalodon_export.serving.engine`, whose steps also sample, decode text and wake readers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import megalodon_export
from megalodon_export import Session
from megalodon_export.generation.sampling import SamplingParams
from megalodon_export.runtimes import PlainModes
from megalodon_export.serving.engine import Engine, EngineOptions
from megalodon_export.serving.observer import Observer
from megalodon_export.serving.streams import Request, Stream

_PROMPT_TOKENS = 4
_WARM_UP = 8  # steps


def wait(session: Session) -> None:
    """Wait for the device."""
    if session.runtime.device.type == "cuda":
        torch.cuda.synchronize()


def bare(session: Session, batch: int, tokens: int) -> float:
    """Seconds a step of the decode program."""
    with PlainModes():
        programs = session.runtime.bind(session.runtime.new_cache(batch))
        fed = torch.ones(batch, dtype=torch.int64)
        ends = []
        for _ in range(tokens + _WARM_UP):
            programs.step(fed)
            wait(session)
            ends.append(time.perf_counter())
        return statistics.median(after - before for before, after in pairwise(ends[_WARM_UP:]))


class Steps(Observer):
    """When steps of a full batch have ended."""

    def __init__(self, batch: int) -> None:
        self.batch, self.ends = batch, list[float]()

    def stepped(self, rows: int, seconds: float) -> None:
        """A step has ended."""
        if rows == self.batch:
            self.ends.append(time.perf_counter())


def engine(engine: Engine, batch: int, tokens: int, temperature: float) -> float:
    """Run as many streams; the seconds until all of them have their first token."""
    news, started = threading.Event(), time.monotonic()
    everything: list[Stream] = []
    for seed in range(batch):
        prompt, params = [seed % 256 + 1] * _PROMPT_TOKENS, SamplingParams(temperature=temperature, seed=seed)
        everything += engine.submit(Request(prompt, tokens, params), news.set)
    streams = everything
    while streams:
        news.wait()
        news.clear()
        updates = [(stream, stream.take()) for stream in streams]
        if errors := [update.error for _, update in updates if update.error]:
            raise RuntimeError(errors[0])
        streams = [stream for stream, update in updates if not update.is_last]
    return max(stream.times.first_token for stream in everything) - started


def measure(session: Session, batch: int, tokens: int, temperature: float) -> dict[str, Any]:
    """Both, for one batch size: medians over the steps in which all streams ran."""
    plain, steps = bare(session, batch, tokens), Steps(batch)
    options = EngineOptions(streams=batch, queue=batch, keep=False)
    running = Engine(session.runtime, session.tokenizer, options, steps)
    try:
        engine(running, batch, batch + _WARM_UP, temperature)  # captures the graphs on a GPU
        steps.ends.clear()
        first = engine(running, batch, batch + tokens, temperature)  # the first stream runs while the last is fed
    finally:
        running.close()
    served = statistics.median(after - before for before, after in pairwise(steps.ends))
    return {
        "batch": batch,
        "bare_tokens_per_second": batch / plain,
        "engine_tokens_per_second": batch / served,
        "share": plain / served,
        "added_ms": (served - plain) * 1e3,
        "all_started_ms": first * 1e3,
    }


def main() -> None:
    """Print a table, or a line of JSON for each batch size."""
    parser = argparse.ArgumentParser(description="The serving engine beside the bare decode program.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runtime", default=None)
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    session = megalodon_export.load(args.bundle, runtime=args.runtime)
    for batch in args.batch or [1, 8, 64]:
        found = measure(session, batch, args.tokens, args.temperature)
        print(
            json.dumps(found)
            if args.json
            else f"batch {batch:4}: bare {found['bare_tokens_per_second']:10,.0f} tokens/s, engine "
            f"{found['engine_tokens_per_second']:10,.0f} tokens/s ({found['share']:.0%}), "
            f"{found['added_ms']:+.2f} ms a step; all started after {found['all_started_ms']:,.0f} ms",
            flush=True,
        )


if __name__ == "__main__":
    main()
