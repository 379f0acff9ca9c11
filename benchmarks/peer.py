"""Time megalodon-hf (PyTorch, package `megalodon`) on the same sizes in the same run: `speed.py --peer CHECKOUT`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from engines import Subject

from megalodon_export.bundles.manifest import DTYPES
from megalodon_export.measure.bench import WARM_UP, PeakRates, median_seconds
from megalodon_export.measure.roofline import decode_bytes, prefill_flops, visible_tokens

NAME = "megalodon-hf"


def open_peer(path: Path, subject: Subject) -> torch.nn.Module:
    """megalodon-hf's model in the subject's sizes, with random weights on the device.

    ValueError if `path` is not a checkout of megalodon-hf.
    """
    source = path / "src" if (path / "src").is_dir() else path
    if not (source / "megalodon").is_dir():
        raise ValueError(f"{path} has no package 'megalodon'; give a checkout of megalodon-hf")
    sys.path.insert(0, str(source))
    package = importlib.import_module("megalodon")
    known = signature(package.MegalodonConfig.__init__).parameters
    fields = {name: value for name, value in subject.config.to_dict().items() if name in known}
    torch.manual_seed(0)
    with torch.device(subject.device):
        model = package.MegalodonForCausalLM(package.MegalodonConfig(**fields))
    return model.to(DTYPES[subject.dtype]).eval().requires_grad_(False)


def time_peer(
    model: Any, subject: Subject, batches: Sequence[int], prompts: Sequence[int], steps: int, peak: PeakRates
) -> Iterator[dict[str, Any]]:
    """Rows like those of the runtimes: prefill with and without its cache, decode near the end of a chunk.

    The roofline is the runtimes', which counts the head for one token of each row. megalodon-hf's prefill computes the
    logits of every token.
    """
    config, device, dtype = subject.config, torch.device(subject.device), DTYPES[subject.dtype]

    @torch.no_grad()
    def run(ids: torch.Tensor, **options: Any) -> Any:
        return model(input_ids=ids, return_dict=True, **options)

    def tokens(batch: int, count: int) -> torch.Tensor:
        return torch.randint(config.vocab_size, (batch, count), device=device)

    for batch in batches:
        for count in prompts:
            ids = tokens(batch, count)
            roofline_seconds = prefill_flops(config, batch, count) / peak.matmul
            for cached in (False, True):
                seconds = median_seconds(lambda ids=ids, cached=cached: run(ids, use_cache=cached), device, 3, 1)
                yield {
                    "runtime": NAME if cached else f"{NAME}, no cache",
                    "batch": batch,
                    "prompt_tokens": count,
                    "prefill_seconds": seconds,
                    "prefill_tokens_per_second": batch * count / seconds,
                    "prefill_share": roofline_seconds / seconds,
                }
        first = max(config.chunk_size - steps, WARM_UP)
        state = [run(tokens(batch, max(first - WARM_UP, 1)), use_cache=True).past_key_values]
        token = tokens(batch, 1)

        def step(token: torch.Tensor = token, state: list[Any] = state) -> None:
            state[0] = run(token, past_key_values=state[0], use_cache=True).past_key_values

        seconds = median_seconds(step, device, steps)
        visible = visible_tokens(config, first, steps) / steps
        yield {
            "runtime": NAME,
            "batch": batch,
            "decode_seconds": seconds,
            "decode_tokens_per_second": batch / seconds,
            "decode_share": decode_bytes(config, dtype, batch, visible).total / peak.copy / seconds,
        }
