"""Perplexity and continuations over files of JSON lines, in any runtime; the original's eval.py measures the same.

A line is an object with a field `text`. A document is one stream from its beginning-of-text token to its end-of-text
token, cut into calls of the program, so the memory that it takes on the device does not depend on its length.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from ..bundles import bundle
from ..bundles.checkpoints import default_device, default_dtype, load_model
from ..bundles.manifest import DTYPES, TOKENIZER
from ..generation.arguments import device as device_name
from ..generation.arguments import integer, text, token_ids, utf8
from ..generation.session import Session
from ..model import ModelCache, ModelConfig
from ..model.loss import IGNORED
from ..runtimes import BoundPrograms, Runtime, check_runtime, default_runtime, in_plain_modes, open_runtime
from ..runtimes.base import require_device
from ..runtimes.eager import ModelRuntime

TRUNCATION_STRIDE = 2  # chunks a call when statistics are truncated, as in the original's inference.py


@dataclass(frozen=True)
class Score:
    """Negative log-likelihood in nats, summed over the scored tokens."""

    nats: float = 0.0
    tokens: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.tokens + other.tokens)

    @property
    def perplexity(self) -> float:
        """Per token; ValueError if none was scored."""
        if not self.tokens:
            raise ValueError("there is no token to score: a document needs two, special tokens included")
        return math.exp(self.nats / self.tokens)


@in_plain_modes
def score(
    runtime: Runtime, documents: Sequence[Sequence[int] | Tensor], segment: int | None = None, truncate_chunks: int = 0
) -> Score:
    """Score every token but the first of each document, given as ids, side by side as the rows of a batch.

    `segment`: tokens a call, by default what the programs take; the score does not depend on it. A runtime that cannot
    score decodes token by token instead. `truncate_chunks` N > 2: from N chunks on, after every two, the norms'
    statistics are replaced by those of the last N - 2 chunks alone, as the original does with N = 8; 0 never does.
    """
    chunk = runtime.config.chunk_size
    truncate_chunks = integer("truncate_chunks", truncate_chunks, 0)
    stride = runtime.limits.max_length if segment is None else integer("segment", segment, 1)
    if truncate_chunks and truncate_chunks <= TRUNCATION_STRIDE:
        raise ValueError(f"truncate_chunks is {truncate_chunks}, expected 0 (off) or more than {TRUNCATION_STRIDE}")
    rows = [_ids(runtime, document, f" of document {i}") for i, document in enumerate(documents)]
    steps = _steps(rows)
    programs, nats, longest = runtime.bind(runtime.new_cache(len(rows))), 0.0, int(steps.max())
    cuts = _cuts(longest, stride)
    if truncate_chunks:  # two chunks a call, and what is less than a chunk by itself
        cuts = _cuts(longest, TRUNCATION_STRIDE * chunk) | {longest // chunk * chunk}
    for end, losses, _ in _feed(programs, rows, [row[1:] for row in rows], cuts):
        nats += float(losses.double().sum())
        if truncate_chunks and truncate_chunks * chunk <= end < longest:
            first = end - (truncate_chunks - TRUNCATION_STRIDE) * chunk
            recent = runtime.bind(runtime.new_cache(len(rows)))
            recent.feed(_window(rows, first, end, 0), (steps - first).clamp(0, end - first))
            _replace_statistics(programs.cache, recent.cache)
    return Score(nats, int(steps.sum()))


@in_plain_modes
def score_continuations(
    runtime: Runtime, requests: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[tuple[float, bool]]:
    """Each continuation's log-probability in nats after its context, and whether greedy decoding would choose it.

    `requests` are rows of one batch: contexts of at least one token, continuations of any number. Tokens that are
    context in every row are prefilled in any runtime, so batch contexts of similar lengths together.
    """
    starts = [len(context) for context, _ in requests]
    if not all(starts):
        raise ValueError("a context has no token; begin it with the model's bos_token_id")
    rows = [
        torch.cat([_ids(runtime, part, f" of request {i}") for part in request]) for i, request in enumerate(requests)
    ]
    targets = [F.pad(row[start:], (start - 1, 0), value=IGNORED) for row, start in zip(rows, starts, strict=True)]
    cuts = _cuts(int(_steps(rows).max()), runtime.limits.max_length)
    cuts |= {min(starts) - 1}
    nats = torch.zeros(len(rows), dtype=torch.float64, device=runtime.device)
    greedy = torch.ones(len(rows), dtype=torch.bool, device=runtime.device)
    for _, losses, likeliest in _feed(runtime.bind(runtime.new_cache(len(rows))), rows, targets, cuts):
        nats += losses.double().sum(1)
        greedy &= likeliest.all(1)
    return list(zip((-nats).tolist(), greedy.tolist(), strict=True))


def _ids(runtime: Runtime, values: object, whose: str) -> Tensor:
    """Token ids of the model as a tensor (L) int64 on the CPU."""
    return torch.tensor(token_ids(values, runtime.config.vocab_size, whose), dtype=torch.int64, device="cpu")


def _steps(rows: Sequence[Tensor]) -> Tensor:
    """How many tokens of each row are fed: all but the last."""
    return torch.tensor([max(len(row) - 1, 0) for row in rows], device="cpu")


def _cuts(length: int, stride: int) -> set[int]:
    return {*range(0, length, stride), length}


def _feed(
    programs: BoundPrograms, rows: Sequence[Tensor], targets: Sequence[Tensor], cuts: set[int]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Feed rows in calls from cut to cut.

    Yields the end of each call, and for each target (B, L) its nats, 0 where it is ignored, and whether it is the
    likeliest token or ignored.
    """
    steps = _steps(rows)
    for start, end in itertools.pairwise(sorted(cuts)):
        ids, wanted = _window(rows, start, end, 0), _window(targets, start, end, IGNORED)
        yield end, *_losses(programs, ids, wanted, (steps - start).clamp(0, end - start))


def _window(rows: Sequence[Tensor], start: int, end: int, padding: int) -> Tensor:
    """The ids from start to end of every row, (B, end - start)."""
    pieces = [row[start:end] for row in rows]
    return torch.stack([F.pad(piece, (0, end - start - len(piece)), value=padding) for piece in pieces])


def _losses(programs: BoundPrograms, ids: Tensor, targets: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Feed ids (B, L). For each target (B, L) the nats, and whether it is the likeliest token; see `_judge`."""
    device = programs.runtime.device
    ids, targets = ids.to(device), targets.to(device)
    if not (targets != IGNORED).any():
        programs.feed(ids, lengths)
        return torch.zeros(targets.shape, dtype=torch.float32, device=device), torch.ones_like(
            targets, dtype=torch.bool
        )
    if programs.runtime.can_score:
        return _judge(programs.feed_all(ids, lengths), targets)
    # A row that has ended is fed padding; its later targets are all ignored.
    pairs = [_judge(programs.step(i), t) for i, t in zip(ids.unbind(1), targets.unbind(1), strict=True)]
    losses, likeliest = zip(*pairs, strict=True)
    return torch.stack(losses, dim=1), torch.stack(likeliest, dim=1)


def _judge(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Nats of targets (...) under logits (..., V), and whether they are the likeliest; 0 and True for ignored ones."""
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(targets.shape), (logits.argmax(-1) == targets) | (targets == IGNORED)


def _replace_statistics(cache: ModelCache, recent: ModelCache) -> None:
    """Copy the norms' statistics and their count. Both caches are at a chunk boundary, where the rings are empty."""
    for old, new in zip(cache.layers, recent.layers, strict=True):
        old.norm_mean.copy_(new.norm_mean)
        old.norm_var.copy_(new.norm_var)
    cache.final.store_states(recent.final.norm_mean, recent.final.norm_var)
    cache.position.copy_(recent.position)


@dataclass(frozen=True)
class Target:
    """A runtime to evaluate, and the tokenizer of its folder."""

    runtime: Runtime
    tokenizer: Tokenizer
    name: str  # of the runtime

    @classmethod
    def open(
        cls, folder: Path, runtime: str | None = None, device: str | None = None, dtype: str | None = None
    ) -> Target:
        """A bundle in a runtime (default: that of its programs), or a checkpoint, which runs in eager mode.

        `dtype` is for checkpoints (default: float32 on a CPU, bfloat16 on CUDA); a bundle has its own.
        """
        device = device_name(device)
        if runtime is not None:
            check_runtime(runtime)
        if not (folder / TOKENIZER).is_file():
            raise ValueError(f"{folder} has no {TOKENIZER} to turn text into token ids; put one there")
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        if not (folder / bundle.MANIFEST).exists():
            if runtime not in (None, "eager"):
                raise ValueError(
                    f"{folder} is a checkpoint, which runs in eager mode; export it to run it in {runtime}"
                )
            device = device or default_device()
            require_device(torch.device(device))
            chosen = DTYPES[dtype or default_dtype(device)]
            return cls(ModelRuntime(load_model(folder, chosen, device)), tokenizer, "eager")
        manifest = bundle.read(folder)
        if dtype is not None:
            raise ValueError(f"{folder} is a bundle in {manifest.dtype}; leave out the dtype, or give a checkpoint")
        name = runtime or default_runtime(manifest)
        return cls(open_runtime(name, folder, manifest, device), tokenizer, name)


def perplexity(target: Target, path: Path, batch: int = 1, truncate_chunks: int = 0) -> dict[str, Any]:
    """Score a file of JSON lines, `batch` documents at a time; ValueError names a line without a text."""
    batch = integer("batch", batch, 1)
    total, count, documents = Score(), 0, (encode(target, one) for one in texts(path))
    while group := list(itertools.islice(documents, batch)):
        total += score(target.runtime, group, truncate_chunks=truncate_chunks)
        count += len(group)
    if not total.tokens:
        raise ValueError(
            f"{path} has no token to score; expected lines like {json.dumps({'text': 'In the beginning'})}"
        )
    return {
        "file": str(path),
        "runtime": target.name,
        "perplexity": total.perplexity,
        "nats_per_token": total.nats / total.tokens,
        "tokens": total.tokens,
        "documents": count,
    }


def generations(target: Target, path: Path, max_new_tokens: int, **sampling: Any) -> Iterator[dict[str, str]]:
    """Continue the text of every line as `generate` does, each as a stream of its own."""
    session = Session(target.runtime, target.tokenizer)
    for prompt in texts(path):
        session.reset()
        yield {"prompt": prompt, "generation": "".join(session.generate(prompt, max_new_tokens, **sampling))}


def encode(target: Target, document: str) -> list[int]:
    """A document's ids between the model's beginning and end of text, where it has them, as in the original."""
    config: ModelConfig = target.runtime.config
    start, end = ([] if i is None else [i] for i in (config.bos_token_id, config.eos_token_id))
    return [*start, *target.tokenizer.encode(text(document, "the document"), add_special_tokens=False).ids, *end]


def texts(path: Path) -> Iterator[str]:
    """The field `text` of every line of a file; blank lines are skipped."""
    with path.open("rb") as lines:
        for number, data in enumerate(lines, 1):
            line = utf8(data, f"{path}, line {number}")
            if not line.strip():
                continue
            try:
                found = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                found = None
            if not isinstance(found, str):
                raise ValueError(f'{path}, line {number}: expected an object like {{"text": "..."}}, got {line[:60]!r}')
            yield text(found, f"{path}, line {number}: the text")
