"""Parity: every runtime of a bundle against the eager model, logits and caches, over splits at every boundary."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model import ModelCache
from ..runtimes import RUNTIMES, Runtime, open_runtime
from . import bundle
from .manifest import Manifest
from .parity import read_parity
from .writing import update_parity

# Largest allowed |difference|, logits absolute and cache relative to each tensor's largest value. float32 programs
# differ from eager in the order of sums alone; bfloat16 has 8 bits, and a rounding in one layer is seen by all after.
BOUNDS = {
    "float32": 1e-4,
    "float64": 1e-9,
    "bfloat16": 0.5,  # default model 0.25, two units in the last place
    "float16": 0.1,  # against float32 of the same weights
}


class VerificationError(Exception):
    """A runtime's numbers differ from the eager model's by more than the bound."""


@dataclass(frozen=True)
class Case:
    """Calls on one batch: for each, the number of tokens of every row; a list is a prefill, None a decode step."""

    name: str
    batch: int
    calls: tuple[tuple[int, ...] | None, ...]


def cases(chunk: int, max_batch: int) -> Iterator[Case]:
    """Lengths 1, a chunk, a chunk + 1, starts in the middle of a chunk, ragged rows, rows of length 0, decode runs."""
    steps = (None,) * 3
    middle = max(chunk // 2, 1)
    yield Case("one token, then decode", 1, ((1,), *steps))
    yield Case("forty tokens, then decode", 1, ((40,), *steps))
    yield Case("a chunk, then decode", 1, ((chunk,), *steps))
    yield Case("a chunk and one", 1, ((chunk + 1,), *steps))
    yield Case("from the middle of a chunk", 1, ((middle,), None, (chunk,), *steps))
    if max_batch > 1:
        yield Case("two rows, two lengths", 2, ((middle, 1), (1, chunk), *steps))
    if max_batch > 4:
        ragged = (1, chunk, 0, min(3, chunk), 2 * chunk + 1)
        yield Case("five rows, one empty", 5, (ragged, (2, 0, 1, chunk, 1), *steps))


def verify(
    folder: Path, runtimes: list[str] | None = None, report: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Check hashes, then every runtime the bundle has programs for; writes parity.json and returns it.

    A bundle that cannot be written is verified all the same, and `report` gets a note.
    BundleError for a damaged bundle; VerificationError, after parity.json is written, for numbers out of bounds.
    """
    manifest = bundle.read(folder)
    available = [name for name in RUNTIMES if name in manifest.programs.by_runtime()]
    read_parity(folder, manifest)  # a damaged report is part of a damaged bundle
    report = report or (lambda message: None)
    parity = measure(folder, manifest, runtimes or available, report)
    try:
        parity = update_parity(folder, manifest, parity)
    except OSError as error:  # a read-only disk, for one; the numbers are as good
        report(f"{error}, and is as it was")
    return require(parity)


def verify_folder(
    folder: Path, manifest: Manifest, runtimes: list[str], report: Callable[[str], None]
) -> dict[str, Any]:
    """The checks of `verify` on a folder that is not sealed yet; writes nothing, and returns what it measured."""
    return require(measure(folder, manifest, runtimes, report))


def measure(folder: Path, manifest: Manifest, runtimes: list[str], report: Callable[[str], None]) -> dict[str, Any]:
    """Largest differences per runtime and case."""
    results = []
    for name in runtimes:
        candidate = open_runtime(name, folder, manifest)
        reference = open_runtime("eager", folder, manifest, str(candidate.device))
        for case in cases(candidate.config.chunk_size, candidate.limits.max_batch):
            logits, cache, agreement = compare(candidate, reference, case)
            results.append(
                {
                    "runtime": name,
                    "case": case.name,
                    "logits": logits,
                    "cache": cache,
                    "same_greedy_token": agreement,
                    "bound": BOUNDS[manifest.dtype],
                }
            )
            report(f"{name}: {case.name}: logits {logits:.1e}, cache {cache:.1e}")
    return {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "dtype": manifest.dtype,
        "against": "eager",
        "results": results,
    }


def require(parity: dict[str, Any]) -> dict[str, Any]:
    """Raise VerificationError, naming the cases, unless every result is in its bound."""
    bad = [r for r in parity["results"] if not max(r["logits"], r["cache"]) <= r["bound"]]
    if bad:
        listed = "; ".join(
            f"{r['runtime']}, {r['case']}: logits {r['logits']:.1e}, cache {r['cache']:.1e}" for r in bad
        )
        raise VerificationError(f"out of the bound of {bad[0]['bound']:.0e} from the eager model: {listed}")
    return parity


def compare(candidate: Runtime, reference: Runtime, case: Case) -> tuple[float, float, float]:
    """Run a case on both; largest logits difference, largest relative cache difference, share of equal best tokens."""
    generator = torch.Generator().manual_seed(0)
    pair = [runtime.bind(runtime.new_cache(case.batch), capture=False) for runtime in (candidate, reference)]
    worst, equal, compared = 0.0, 0, 0
    for call in case.calls:
        lengths = torch.tensor(call if call is not None else (1,) * case.batch)
        shape = (case.batch, int(lengths.max())) if call is not None else (case.batch,)
        token_ids = torch.randint(candidate.config.vocab_size, shape, generator=generator)
        found = []
        for programs in pair:
            ids = token_ids.to(programs.runtime.device)
            logits = programs.decode(ids) if call is None else programs.prefill(ids, lengths)
            found.append(logits[lengths.to(logits.device) > 0].clone())
        worst = max(worst, _difference(found[0], found[1]))
        equal += int((found[0].argmax(-1) == found[1].argmax(-1)).sum())
        compared += found[0].shape[0]
    cache_difference = max(
        _difference(a, b, max(float(b.abs().max()), 1e-6))
        for a, b in zip(visible(pair[0].cache), visible(pair[1].cache), strict=True)
    )
    return worst, cache_difference, equal / compared


def visible(cache: ModelCache) -> Iterator[Tensor]:
    """The cache as a stream can see it: slots of the rings that hold no token of the chunk are zeroed."""
    chunk = cache.layers[0].key.shape[2]
    valid = torch.arange(chunk, device=cache.position.device) < (cache.position % chunk)[:, None]
    for layer in cache.layers:
        for ring in (layer.key, layer.value):
            yield torch.where(valid[:, None, :, None], ring, 0).float()
    rings = {id(ring) for layer in cache.layers for ring in (layer.key, layer.value)}
    yield from (t.double() for t in itertools.filterfalse(lambda t: id(t) in rings, cache.tensors()))


def _difference(a: Tensor, b: Tensor, scale: float = 1.0) -> float:
    """Largest |a - b| / scale; the largest float if there is NaN or infinity, which max() and JSON would lose."""
    difference = float((a.double() - b.double()).abs().max()) / scale if a.numel() else 0.0
    return difference if math.isfinite(difference) else sys.float_info.max
