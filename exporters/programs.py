"""The two programs of a model, prefill and decode: their inputs and outputs by name, and torch.export of both.

Every exporter and runtime works from `program_specs`; the modules are the ones that eager uses. Each program takes its
inputs as one flat list, updates the cache tensors in place, and returns the logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx.experimental._config as fx_config
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from ..model import MegalodonCache, MegalodonConfig, MegalodonForCausalLM, cache_layout, dimension_sizes
from ..model.ema import BLOCK

PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True)
class Limits:
    """Bounds of the dynamic sizes: batch 1..max_batch; prefill lengths are multiples of `granule` up to max_length.

    A call's `lengths` say how many tokens of each row count, so callers pad to the granule.
    """

    max_batch: int = 64
    max_length: int = 2048
    granule: int = BLOCK

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise ValueError(f"max_batch is {self.max_batch}, expected at least 1")
        if self.max_length < self.granule or self.max_length % self.granule:
            raise ValueError(f"max_length is {self.max_length}, expected a multiple of {self.granule}, at least that")

    @classmethod
    def of(cls, config: MegalodonConfig, max_batch: int = 64, max_length: int | None = None) -> Limits:
        """Limits that suit a model: prefill takes up to one chunk a call (at most 2,048 tokens) unless told otherwise.

        ValueError if max_length is not a multiple of what the model's chunks ask for.
        """
        chunk = config.chunk_size
        default = min(chunk, 2048) // BLOCK * BLOCK
        if (max_length or default) <= chunk and default:
            return cls(max_batch, max_length or default, BLOCK)
        granule = math.lcm(BLOCK, chunk) if chunk % BLOCK == 0 or BLOCK % chunk == 0 else BLOCK
        return cls(max_batch, max_length or max(granule, 128 // granule * granule), granule)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor at a program's boundary: name, dimensions (letters, or numbers), dtype as torch names it."""

    name: str
    dims: tuple[str, ...]
    dtype: str


@dataclass(frozen=True)
class ProgramSpec:
    """What goes into a program and what comes out; `cache` inputs are updated in place."""

    name: str
    arguments: tuple[TensorSpec, ...]
    cache: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """All inputs in the order of a call."""
        return self.arguments + self.cache


def program_specs(config: MegalodonConfig, dtype: torch.dtype, all_logits: bool = False) -> dict[str, ProgramSpec]:
    """The specs of both programs, derived from the cache layout. `all_logits`: prefill returns those of every token."""
    cache = tuple(TensorSpec(t.name, t.dims, dtype_name(t.torch_dtype(dtype))) for t in cache_layout(config))
    logits_dtype = "float64" if dtype == torch.float64 else "float32"
    logits = TensorSpec("logits", ("B", "V"), logits_dtype)
    ids, lengths = TensorSpec("token_ids", ("B",), "int64"), TensorSpec("lengths", ("B",), "int64")
    prefill_logits = replace(logits, dims=("B", "L", "V")) if all_logits else logits
    return {
        PREFILL: ProgramSpec(PREFILL, (replace(ids, dims=("B", "L")), lengths), cache, (prefill_logits,)),
        DECODE: ProgramSpec(DECODE, (ids,), cache, (logits,)),
    }


def static_sizes(config: MegalodonConfig) -> dict[str, int]:
    """What the letters of the specs stand for, but the dynamic B and L."""
    return {**dimension_sizes(config), "V": config.logits_size}


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float32 -> "float32"."""
    return str(dtype).removeprefix("torch.")


class PrefillProgram(nn.Module):
    """token_ids (B, L), lengths (B), cache tensors -> logits (B, V), or (B, L, V) with all_logits."""

    def __init__(self, model: MegalodonForCausalLM, max_length: int, all_logits: bool) -> None:
        super().__init__()
        self.model, self.max_length, self.all_logits = model, max_length, all_logits

    def forward(self, token_ids: Tensor, lengths: Tensor, cache: list[Tensor]) -> Tensor:
        """One call of the program."""
        torch._check(token_ids.shape[1] % BLOCK == 0)  # known to the tracer, it keeps padding out of every shape
        state = MegalodonCache.from_tensors(self.model.config, cache)
        return self.model.prefill(token_ids, lengths, state, self.max_length, self.all_logits)


class DecodeProgram(nn.Module):
    """token_ids (B), cache tensors -> logits (B, V)."""

    def __init__(self, model: MegalodonForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: Tensor, cache: list[Tensor]) -> Tensor:
        """One call of the program."""
        return self.model.decode(token_ids, MegalodonCache.from_tensors(self.model.config, cache))


def export_program(model: MegalodonForCausalLM, name: str, limits: Limits, all_logits: bool = False) -> ExportedProgram:
    """torch.export of one program of a frozen model, batch and length dynamic within `limits`."""
    device, vocabulary = model.device, model.config.vocab_size
    batch_size = min(3, limits.max_batch)
    batch = Dim("B", min=1, max=limits.max_batch) if limits.max_batch > 1 else None
    cache = model.new_cache(batch_size).tensors()
    cache_dims = [{0: batch}] * len(cache)
    if name == DECODE:
        program: nn.Module = DecodeProgram(model)
        arguments: tuple[Any, ...] = (torch.randint(vocabulary, (batch_size,), device=device), cache)
        dims: tuple[Any, ...] = ({0: batch}, cache_dims)
    else:
        program = PrefillProgram(model, limits.max_length, all_logits)
        blocks = limits.max_length // limits.granule
        length = limits.granule * Dim("blocks", min=1, max=blocks) if blocks > 1 else None
        # Not the largest length, which may equal another size, and no size inside the graph may be 1 in the example.
        example = limits.granule * (blocks - 1 if blocks > 3 else blocks)
        token_ids = torch.randint(vocabulary, (batch_size, example), device=device)
        arguments = (token_ids, torch.full((batch_size,), example - 1, device=device), cache)
        dims = ({0: batch, 1: length}, {0: batch}, cache_dims)
    with torch.no_grad(), sizes_of_one_are_not_special():
        return export(program, arguments, dynamic_shapes=dims, strict=False)


@contextmanager
def sizes_of_one_are_not_special() -> Iterator[None]:
    """Batch 1 and one block are in range: torch must not treat them as other programs (0/1 specialisation)."""
    with fx_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        yield
