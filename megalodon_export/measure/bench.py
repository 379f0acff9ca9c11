"""Time a runtime: load, prefill, first token, decode step and generation, each apart.

Every time stands beside the roofline: the bytes or operations that the model needs (`roofline.py`) over the peak rates
of the device, measured in the same run.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bundles import bundle
from ..export.versions import versions
from ..generation.decode_loop import DecodeLoop
from ..generation.sampling import SamplingParams
from ..model import ModelCache
from ..runtimes import Runtime, open_runtime
from .roofline import decode_bytes, prefill_flops, visible_tokens

_COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
_MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
WARM_UP = 3


@dataclass(frozen=True)
class PeakRates:
    """The rates that a device reached in this run, on random data."""

    copy: float  # bytes a second, read and written, of a large copy
    matmul: float  # floating-point operations a second of a large matrix product

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> PeakRates:
        """Measure both on the device, the product in the dtype."""
        return cls(copy_rate(device), matmul_rate(device, dtype))


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a large copy on the device."""
    source = torch.rand(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device, 7)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large square matrix product in the dtype; a multiplication and an addition are 2."""
    size = _MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: a @ b, device, 7)


def bench(
    folder: Path, runtimes: Sequence[str], batches: Sequence[int], prompt_tokens: int = 512, steps: int = 64
) -> dict[str, Any]:
    """Median times in seconds on this machine, per runtime and batch size, and the peak rates measured in this run.

    `prefill_share` and `decode_share` are shares of the roofline: the time that the roofline allows (operations over
    the matmul's rate, bytes over the copy's) over the measured time.
    """
    started = time.perf_counter()
    manifest = bundle.read(folder)
    check_seconds = time.perf_counter() - started
    results: list[dict[str, Any]] = []
    peak, device = PeakRates(0.0, 0.0), torch.device("cpu")
    for name in runtimes:
        started = time.perf_counter()
        runtime = open_runtime(name, folder, manifest)
        load_seconds = time.perf_counter() - started
        if not results or runtime.device != device:
            device = runtime.device
            peak = PeakRates.measure(device, runtime.dtype)
        for batch in batches:
            timed = {
                **time_prefill(runtime, batch, prompt_tokens, peak),
                **time_decode(runtime, batch, steps, peak),
            }
            results.append({"runtime": name, "batch": batch, "load_seconds": load_seconds, **timed})
    return {
        "folder": str(folder),
        "dtype": manifest.dtype,
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "prompt_tokens": prompt_tokens,
        "decode_steps": steps,
        "hash_check_seconds": check_seconds,
        "copy_gigabytes_per_second": peak.copy / 1e9,
        "matmul_teraflops": peak.matmul / 1e12,
        "versions": versions(),
        "results": results,
    }


def time_prefill(
    runtime: Runtime, batch: int, tokens: int, peak: PeakRates, repeats: int = 5, warm_up: int = WARM_UP
) -> dict[str, Any]:
    """Time a prefill of fresh streams, and the way from a prompt on the host to its first token on the host."""
    prompt = random_tokens(runtime, batch, tokens)
    device = runtime.device
    lengths = torch.full((batch,), tokens, dtype=torch.int64, device="cpu")
    programs = runtime.bind(runtime.new_cache(batch))
    cache = programs.cache

    def first_token() -> list[int]:
        cache.position.zero_()  # makes the streams fresh: no slot of the ring is visible
        loop.start(programs.feed(prompt.to(device), lengths), [SamplingParams()] * batch, 1)
        return loop.read()

    on_device = prompt.to(device)
    loop = DecodeLoop(programs, 0)
    calls = repeats, warm_up
    seconds = median_seconds(lambda: (cache.position.zero_(), programs.feed(on_device, lengths)), device, *calls)
    operations = prefill_flops(runtime.config, batch, tokens, all_logits=runtime.all_logits)
    return {
        "prompt_tokens": tokens,
        "prefill_seconds": seconds,
        "first_token_seconds": median_wall_seconds(first_token, *calls),
        "prefill_tokens_per_second": batch * tokens / seconds,
        "prefill_flops": operations,
        "prefill_teraflops": operations / seconds / 1e12,
        "prefill_share": operations / peak.matmul / seconds,
    }


def time_decode(
    runtime: Runtime, batch: int, steps: int, peak: PeakRates, position: int | None = None
) -> dict[str, Any]:
    """Time a decode step, and a token of the generation loop. On CUDA the step is a captured graph.

    The first timed step is at `position`. By default the last one is at the end of a chunk, where attention reads most.
    """
    chunk, cache = runtime.config.chunk_size, runtime.new_cache(batch)
    first = max(chunk - steps, WARM_UP) if position is None else position
    fill(cache, first - WARM_UP)
    seconds = _time_step(runtime, cache, steps)
    visible = visible_tokens(runtime.config, first, steps) / steps
    moved = decode_bytes(runtime.config, runtime.dtype, batch, visible).total
    fill(cache, first - WARM_UP)
    return {
        "decode_position": first,
        "decode_visible_tokens": visible,
        "decode_seconds": seconds,
        "decode_tokens_per_second": batch / seconds,
        "decode_bytes": moved,
        "decode_gigabytes_per_second": moved / seconds / 1e9,
        "decode_share": moved / peak.copy / seconds,
        "generate_seconds": _time_generation(runtime, cache, steps),
    }


def _time_step(runtime: Runtime, cache: ModelCache, steps: int) -> float:
    programs = runtime.bind(cache)
    token_ids = random_tokens(runtime, cache.batch, 1)[:, 0].to(runtime.device)
    return median_seconds(lambda: programs.step(token_ids), runtime.device, steps)


def _time_generation(runtime: Runtime, cache: ModelCache, steps: int) -> float:
    """Seconds for each token of the loop that sessions use, with greedy sampling and every token read on the host."""
    loop = DecodeLoop(runtime.bind(cache), can_roll_back=cache.batch == 1)
    logits = torch.randn(cache.batch, runtime.config.logits_size, device=runtime.device)
    loop.start(logits, [SamplingParams()] * cache.batch, steps + WARM_UP)
    started = 0.0
    for index in range(steps + WARM_UP):
        loop.read()
        if index == WARM_UP - 1:
            started = time.perf_counter()
        if index < steps + WARM_UP - 1:
            loop.advance()
    return (time.perf_counter() - started) / steps


def random_tokens(runtime: Runtime, batch: int, tokens: int) -> Tensor:
    """Token ids (B, L) on the host, the same at every call."""
    return torch.randint(runtime.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0))


def fill(cache: ModelCache, position: int) -> None:
    """Fill a cache with random numbers, and put its streams at `position`. Zeros would give times that are too good."""
    generator = torch.Generator(cache.position.device).manual_seed(0)
    for tensor in cache.tensors():
        if tensor.is_floating_point():
            tensor.normal_(generator=generator).abs_()  # variances are positive
    cache.position.fill_(max(position, 0))


def median_seconds(call: Callable[[], Any], device: torch.device, repeats: int, warm_up: int = WARM_UP) -> float:
    """Median seconds of a call, after `warm_up` calls that are not counted.

    On CUDA the times are between events, and the host does not wait between the calls.
    """
    if device.type != "cuda":
        return median_wall_seconds(call, repeats, warm_up)
    for _ in range(warm_up):
        call()
    torch.cuda.synchronize(device)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in pairs:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3


def median_wall_seconds(call: Callable[[], Any], repeats: int, warm_up: int = WARM_UP) -> float:
    """Median seconds of a call by the host's clock, after `warm_up` calls that are not counted.

    The call has to return only when its work is done.
    """
    times = []
    for index in range(repeats + warm_up):
        started = time.perf_counter()
        call()
        if index >= warm_up:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def machine(device: torch.device) -> str:
    """The name of the GPU or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "CPU"


def table(report: dict[str, Any]) -> str:
    """The report of `bench` as text: one line for each runtime and batch size."""
    lines = [
        f"{report['folder']}: {report['dtype']}, {report['machine']}, {report['threads']} threads, "
        f"copy {report['copy_gigabytes_per_second']:.1f} GB/s, matmul {report['matmul_teraflops']:.3g} TFLOP/s, "
        f"hashes checked in {report['hash_check_seconds']:.2f} s",
        f"prompts of {report['prompt_tokens']} tokens; medians; roofline by matmul (prefill) and copy (decode)",
        f"{'runtime':<8}{'batch':>6}{'load s':>9}{'prefill ms':>12}{'tokens/s':>10}{'roofline':>9}{'first ms':>10}"
        f"{'decode ms':>11}{'tokens/s':>10}{'GB/s':>8}{'roofline':>9}{'loop ms':>10}",
    ]
    for r in report["results"]:
        lines.append(
            f"{r['runtime']:<8}{r['batch']:>6}{r['load_seconds']:>9.2f}{r['prefill_seconds'] * 1e3:>12.2f}"
            f"{r['prefill_tokens_per_second']:>10.0f}{_percent(r['prefill_share']):>9}"
            f"{r['first_token_seconds'] * 1e3:>10.2f}"
            f"{r['decode_seconds'] * 1e3:>11.3f}{r['decode_tokens_per_second']:>10.0f}"
            f"{r['decode_gigabytes_per_second']:>8.1f}{_percent(r['decode_share']):>9}"
            f"{r['generate_seconds'] * 1e3:>10.3f}"
        )
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{share:.0%}" if math.isfinite(share) else "-"
