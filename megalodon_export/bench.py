"""Timing a bundle: load, prefill, first token and decode apart, beside the floor that memory bandwidth sets."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import bundle
from .checkpoints import DTYPES
from .export import versions
from .model import MegalodonConfig
from .runtimes import Runtime, open_runtime
from .snapshot import state_size

_COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}


def bench(
    folder: Path, runtimes: Sequence[str], batches: Sequence[int], prompt_tokens: int = 512, steps: int = 64
) -> dict[str, Any]:
    """Median times in seconds on this machine, per runtime and batch size, and the copy bandwidth measured in this run.

    A decode step must at least read the weights it uses once and the caches of its rows (the floor); `share` is the
    floor over the time taken.
    """
    started = time.perf_counter()
    manifest = bundle.read(folder)
    check_seconds = time.perf_counter() - started
    config, dtype = MegalodonConfig(**manifest["config"]), DTYPES[manifest["dtype"]]
    results, bandwidth, device = [], 0.0, torch.device("cpu")
    for name in runtimes:
        started = time.perf_counter()
        runtime = open_runtime(name, folder, manifest)
        load_seconds = time.perf_counter() - started
        if not bandwidth or runtime.device != device:
            device, bandwidth = runtime.device, copy_bandwidth(runtime.device)
        for batch in batches:
            timed = time_runtime(runtime, batch, prompt_tokens, steps)
            moved = decode_bytes(config, dtype, batch)
            results.append(
                {
                    "runtime": name,
                    "batch": batch,
                    "load_seconds": load_seconds,
                    **timed,
                    "prefill_tokens_per_second": batch * prompt_tokens / timed["prefill_seconds"],
                    "decode_tokens_per_second": batch / timed["decode_seconds"],
                    "decode_bytes": moved,
                    "decode_gigabytes_per_second": moved / timed["decode_seconds"] / 1e9,
                    "share": moved / bandwidth / timed["decode_seconds"],
                }
            )
    return {
        "folder": str(folder),
        "dtype": manifest["dtype"],
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "prompt_tokens": prompt_tokens,
        "decode_steps": steps,
        "hash_check_seconds": check_seconds,
        "copy_gigabytes_per_second": bandwidth / 1e9,
        "versions": versions(),
        "results": results,
    }


def time_runtime(runtime: Runtime, batch: int, prompt_tokens: int, steps: int) -> dict[str, float]:
    """Median prefill, first token (a prefill of one chunk, then a choice) and decode step, in seconds, warmed up."""
    vocabulary, device = runtime.config.vocab_size, runtime.device
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (batch, prompt_tokens), generator=generator).to(device)
    lengths = torch.full((batch,), prompt_tokens)
    cache = runtime.new_cache(batch)
    prefill = median_seconds(lambda: runtime.prefill(prompt, lengths, cache), device, 5)
    short = prompt[:, : runtime.limits.granule]
    short_lengths = torch.full((batch,), short.shape[1])
    first = median_seconds(lambda: runtime.prefill(short, short_lengths, cache).argmax(-1), device, 5)
    step = runtime.decoder(cache)
    token_ids = prompt[:, 0].contiguous()
    decode = median_seconds(lambda: step(token_ids), device, steps)
    return {"prefill_seconds": prefill, "first_token_seconds": first, "decode_seconds": decode}


def median_seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median duration of a call after three that are not counted; on a GPU, until it is done."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for index in range(repeats + 3):
        finish()
        started = time.perf_counter()
        call()
        finish()
        if index >= 3:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a large copy of random data on the device."""
    source = torch.rand(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device, 7)


def decode_bytes(config: MegalodonConfig, dtype: torch.dtype, batch: int) -> int:
    """What a decode step cannot avoid reading: matrices once, and the state of each row with a full chunk."""
    c = config
    gates = (3 if c.swiglu else 2) * c.model_dim * c.ffn_hidden_dim
    attention = c.model_dim * (c.z_dim + 2 * c.value_dim + c.model_dim) + c.value_dim * c.model_dim
    matrices = c.num_layers * (gates + attention) + c.model_dim * c.logits_size
    ema = c.num_layers * 5 * c.model_dim * c.cema_ndim * 4
    return matrices * dtype.itemsize + ema + batch * state_size(config, dtype)


def machine(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "CPU"


def table(report: dict[str, Any]) -> str:
    """The report for a reader."""
    lines = [
        f"{report['folder']}: {report['dtype']}, {report['machine']}, {report['threads']} threads, "
        f"copy {report['copy_gigabytes_per_second']:.1f} GB/s, hashes checked in {report['hash_check_seconds']:.2f} s",
        f"prefill of {report['prompt_tokens']} tokens; medians; floor: weights and states read once a step",
        f"{'runtime':<8}{'batch':>6}{'load s':>9}{'prefill ms':>12}{'tokens/s':>10}{'first ms':>10}"
        f"{'decode ms':>11}{'tokens/s':>10}{'GB/s':>8}{'of copy':>9}",
    ]
    for r in report["results"]:
        share = f"{r['share']:.0%}" if not math.isnan(r["share"]) else "-"
        lines.append(
            f"{r['runtime']:<8}{r['batch']:>6}{r['load_seconds']:>9.2f}{r['prefill_seconds'] * 1e3:>12.2f}"
            f"{r['prefill_tokens_per_second']:>10.0f}{r['first_token_seconds'] * 1e3:>10.2f}"
            f"{r['decode_seconds'] * 1e3:>11.3f}{r['decode_tokens_per_second']:>10.0f}"
            f"{r['decode_gigabytes_per_second']:>8.1f}{share:>9}"
        )
    return "\n".join(lines)
