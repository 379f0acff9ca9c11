"""The programs of a model, prefill and decode: their inputs and outputs by name, their stages, and their limits.

Every exporter and runtime works from `program_specs`. A program updates the cache in place and returns the logits:

    prefill(token_ids (B, L), lengths (B), cache) -> logits (B, V)
    decode(token_ids (B), cache) -> logits (B, V)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..model.cache import cache_layout, dimension_sizes
from ..model.config import BLOCK, ModelConfig

ProgramName = Literal["prefill", "decode", "decode_one"]
DtypeName = Literal["float64", "float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool"]  # torch's

PREFILL: ProgramName = "prefill"
DECODE: ProgramName = "decode"
DECODE_ONE: ProgramName = "decode_one"  # decode once more, for a batch of 1 alone: on a CPU in a form of its own

# Decode programs for GPUs take this argument too, (2, B) int64, and write the most probable tokens and logit errors.
NEXT_TOKENS = "next_tokens"

BEGIN, LAYER, END = ("begin", "layer", "end")  # of a program; see `stages.py`
MAX_BATCH, MAX_LENGTH = 2**16, 2**24  # of any limits: a larger number is an error, and could not be allocated
LAYER_INDEX = "{layer}"  # in the name of a layer's weight or cache tensor: the number of the layer


@dataclass(frozen=True)
class Limits:
    """Bounds of the dynamic sizes: batch 1..max_batch, prefill lengths up to max_length.

    Prefill lengths are multiples of `length_multiple`. A call's `lengths` say how many tokens of each row count, so
    callers pad.
    """

    max_batch: int = 64
    max_length: int = 2048
    length_multiple: int = BLOCK

    def __post_init__(self) -> None:
        if self.length_multiple < 1:
            raise ValueError(f"length_multiple is {self.length_multiple}, expected at least 1")
        if self.max_batch < 1:
            raise ValueError(f"max_batch is {self.max_batch}, expected at least 1")
        if self.max_batch > MAX_BATCH:
            raise ValueError(f"max_batch is {self.max_batch}, expected at most {MAX_BATCH}")
        if self.max_length > MAX_LENGTH:
            raise ValueError(f"max_length is {self.max_length}, expected at most {MAX_LENGTH}")
        if self.max_length < self.length_multiple or self.max_length % self.length_multiple:
            raise ValueError(
                f"max_length is {self.max_length}, expected a multiple of {self.length_multiple}, at least that"
            )

    @classmethod
    def of(cls, config: ModelConfig, max_batch: int = 64, max_length: int | None = None) -> Limits:
        """Limits that suit a model: prefill takes up to one chunk a call (at most 2,048 tokens) unless told otherwise.

        ValueError if max_length is not a multiple of what the model's chunks ask for, and for a model that attends
        beyond its chunks.
        """
        _check_attention(config)
        chunk = config.chunk_size
        default = min(chunk, 2048) // BLOCK * BLOCK
        if (max_length or default) <= chunk and default:
            return cls(max_batch, max_length or default, BLOCK)
        multiple = math.lcm(BLOCK, chunk)  # whole chunks and whole blocks: no size of the graph is rounded up
        return cls(max_batch, max_length or max(multiple, 128 // multiple * multiple), multiple)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor at a program's boundary: name, dimensions (letters, or numbers), dtype as torch names it."""

    name: str
    dims: tuple[str, ...]
    dtype: DtypeName


@dataclass(frozen=True)
class ProgramSpec:
    """What goes into a program and what comes out; `cache` inputs are updated in place."""

    name: ProgramName
    arguments: tuple[TensorSpec, ...]
    cache: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """All inputs in the order of a call."""
        return self.arguments + self.cache


def program_specs(config: ModelConfig, dtype: torch.dtype, all_logits: bool = False) -> dict[ProgramName, ProgramSpec]:
    """The specs of both programs, derived from the cache layout. `all_logits`: prefill returns those of every token.

    ValueError for a model that attends beyond its chunks.
    """
    _check_attention(config)
    cache = tuple(TensorSpec(t.name, t.dims, dtype_name(t.torch_dtype(dtype))) for t in cache_layout(config))
    logits_dtype: DtypeName = "float64" if dtype == torch.float64 else "float32"
    logits = TensorSpec("logits", ("B", "V"), logits_dtype)
    ids, lengths = TensorSpec("token_ids", ("B",), "int64"), TensorSpec("lengths", ("B",), "int64")
    prefill_logits = replace(logits, dims=("B", "L", "V")) if all_logits else logits
    return {
        PREFILL: ProgramSpec(PREFILL, (replace(ids, dims=("B", "L")), lengths), cache, (prefill_logits,)),
        DECODE: ProgramSpec(DECODE, (ids,), cache, (logits,)),
    }


def _check_attention(config: ModelConfig) -> None:
    if config.attention_window is not None:
        raise ValueError(
            f"max_cache_len is {config.max_cache_len} and cache_unbounded {config.cache_unbounded}: programs attend "
            "inside chunks; run such a model through transformers, or export it with both left out of config.json"
        )


def static_sizes(config: ModelConfig) -> dict[str, int]:
    """What the letters of the specs stand for, but the dynamic B and L."""
    return {**dimension_sizes(config), "V": config.logits_size}


def dtype_name(dtype: torch.dtype) -> DtypeName:
    """torch.float32 -> "float32"."""
    return str(dtype).removeprefix("torch.")  # type: ignore[return-value]
