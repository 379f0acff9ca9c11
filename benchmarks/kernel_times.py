"""Times of the kernels of a prefill and of a decode step, on CUDA: `speed.py --profile`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megalodon_export.measure.bench import WARM_UP, fill, random_tokens
from megalodon_export.runtimes import Runtime

_CALLS = 5

# A group of kernels -> parts of their names. A kernel belongs to the first group that fits.
GROUPS = {
    "EMA and norms": ("moments", "timestep_norm", "rms_norm", "layer_norm", "final_norm", "megalodon_ema"),
    "attention": ("rotate", "scores", "softmax", "pv_matmul", "store_ring", "attend", "combine_splits"),
    "matrix products": ("gemm", "nvjet", "cutlass", "gemv", "splitk"),
}
OTHERS = "elementwise, copies"


def kernel_times(runtime: Runtime, batch: int, tokens: int) -> Iterator[dict[str, Any]]:
    """One row for each pass: microseconds on the device by kernel, and the share of each group in their sum.

    The kernels run one after the other, without a captured CUDA graph, so they do not overlap. Gaps between them are
    not counted.
    """
    cache, lengths = runtime.new_cache(batch), torch.full((batch,), tokens)
    programs = runtime.bind(cache, capture=False)
    prompt = random_tokens(runtime, batch, tokens).to(runtime.device)

    def prefill() -> None:
        cache.position.zero_()
        programs.feed(prompt, lengths)

    yield {"pass": "prefill", "batch": batch, "tokens": tokens, **_profiled(prefill)}
    position = runtime.config.chunk_size - _CALLS - WARM_UP
    fill(cache, position)
    yield {
        "pass": "decode",
        "batch": batch,
        "position": position,
        **_profiled(lambda: programs.step(prompt[:, 0])),
    }


def _profiled(call: Callable[[], object]) -> dict[str, Any]:
    for _ in range(WARM_UP):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(_CALLS):
            call()
        torch.cuda.synchronize()
    on_device = [e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    launches = Counter(event.name for event in on_device)
    times: Counter[str] = Counter()
    for event in on_device:
        times[event.name] += event.device_time / _CALLS
    groups: Counter[str] = Counter()
    for name, microseconds in times.items():
        groups[_group(name)] += microseconds
    total = sum(times.values())
    return {
        "microseconds": total,
        "shares": {group: microseconds / total for group, microseconds in groups.most_common()},
        "kernels": [
            {"name": name, "launches": launches[name] / _CALLS, "microseconds": microseconds}
            for name, microseconds in times.most_common()
        ],
    }


def _group(kernel: str) -> str:
    return next((group for group, parts in GROUPS.items() if any(part in kernel for part in parts)), OTHERS)
