"""Layers compiled by torch.compile: a kind of pass is compiled once, and serves every layer, length and batch.

    model.compile()                        # the same as model.backend = CompiledBackend(model.backend)
    model.prefill(token_ids, lengths)      # the first call compiles one layer

The kinds are prefills of up to a chunk and of several chunks, each with and without a cache, and decode steps.
Sizes vary freely inside a kind because nothing in a layer's graph depends on them:

- the plan, whose tensors follow from lengths and positions, is made outside the compiled layer;
- a prefill is padded to whole blocks, and to two of them at least: compilers take a size of one for a constant. It
  goes in as blocks, so that sizes in the graph are multiples of one number. From a length, they would be remainders
  and quotients of each other, and working with those took four fifths of the time that a first call takes;
- the bound of its length, which decides how many steps a prefix sum has, is one of a few numbers.

A batch of one is compiled for itself, as torch.compile does with every size of one.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from .backend import Backend
from .blocking import padding_to
from .blocks import MegalodonBlock
from .cache import FinalCache, LayerCache
from .compile_time import quick_compilation
from .config import BLOCK
from .norm import TimestepNorm
from .plan import PrefillPlan
from .rotary import Rotary

# Dimensions of the plan's tensors that vary: the batch alone, unless it says otherwise here.
_VARYING: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("valid", "seen", "chunk_start", "slot_time", "index", "slots", "taken"), (0, 1)),
    **dict.fromkeys(("upper_ones", "exponents", "upper", "lag"), ()),
    "time": (0,),
}
_LONG = 16  # a prefill of more than a chunk has a bound of 16 chunks, or 256, or 4,096 ...


class CompiledBackend(Backend):
    """Another back end, each of whose layers runs compiled.

    `options` are those of torch.compile. Where it is asked for dynamic sizes it has them already: see the module.
    """

    def __init__(self, inner: Backend, **options: Any) -> None:
        self.inner = inner
        self.writes_next_tokens = inner.writes_next_tokens
        self._prefill = torch.compile(self._prefill_blocks, **options)
        self._step = torch.compile(inner.step_layer, **options)

    def prefill_sizes(self, length: int, chunk: int) -> tuple[int, int]:
        """Columns: whole blocks, at least two. The bound: a chunk, or a power of 16 chunks."""
        columns = max(length + padding_to(length, BLOCK), 2 * BLOCK)
        bound = chunk
        while bound < columns:
            bound *= _LONG
        return columns, bound

    def prefill_layer(
        self, layer: MegalodonBlock, x: Tensor, plan: PrefillPlan, rotary: Rotary, cache: LayerCache | None
    ) -> Tensor:
        """A layer over new tokens: x (B, L, D) -> (B, L, D)."""
        x = x.unflatten(1, (-1, BLOCK))
        _vary([x, *rotary], (0, 1))
        _vary_plan(plan)
        _vary(() if cache is None else cache.tensors(), (0,))
        with _quick():
            return self._prefill(layer, x, plan, rotary, cache)

    def _prefill_blocks(
        self, layer: MegalodonBlock, x: Tensor, plan: PrefillPlan, rotary: Rotary, cache: LayerCache | None
    ) -> Tensor:
        """A layer over new tokens in blocks: x (B, blocks, T, D) -> (B, L, D)."""
        return self.inner.prefill_layer(layer, x.flatten(1, 2), plan, rotary, cache)

    def step_layer(
        self, layer: MegalodonBlock, x: Tensor, position: Tensor, rotary: Rotary, cache: LayerCache
    ) -> Tensor:
        """A layer over one token of each row: x (B, D) -> (B, D)."""
        _vary([x, position, *rotary, *cache.tensors()], (0,))
        with _quick():
            return self._step(layer, x, position, rotary, cache)

    # What runs once a pass, not once a layer, is not compiled.

    def begin_step(self, model: Any, token_ids: Tensor, position: Tensor) -> tuple[Tensor, Rotary]:
        """As the inner back end."""
        return self.inner.begin_step(model, token_ids, position)

    def prefill_norm(self, norm: TimestepNorm, x: Tensor, plan: PrefillPlan, cache: FinalCache | None) -> Tensor:
        """As the inner back end."""
        return self.inner.prefill_norm(norm, x, plan, cache)

    def step_norm(self, norm: TimestepNorm, x: Tensor, cache: FinalCache) -> Tensor:
        """As the inner back end."""
        return self.inner.step_norm(norm, x, cache)

    def head(self, head: nn.Module, hidden: Tensor) -> Tensor:
        """As the inner back end."""
        return self.inner.head(head, hidden)

    def write_next_tokens(self, logits: Tensor, next_tokens: Tensor) -> None:
        """As the inner back end."""
        self.inner.write_next_tokens(logits, next_tokens)


def _quick() -> AbstractContextManager[None]:
    """The settings for a call that may compile; nothing where the call is traced as a part of something larger."""
    return nullcontext() if torch.compiler.is_compiling() else quick_compilation()


# Private interfaces of torch: `torch._dynamo.maybe_mark_dynamic` and the attribute that it sets. Without the marks, the
# first sizes are taken for constants, and the next ones compile again (`tests/model/test_compiled_layers.py` counts).


def _vary(tensors: Iterable[Tensor], dims: tuple[int, ...]) -> None:
    """Tell torch.compile that dimensions of tensors vary, so that it does not take the first sizes for constants."""
    for tensor in tensors:
        for dim in dims:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)


def _vary_plan(plan: PrefillPlan) -> None:
    if hasattr(plan.tokens.lengths, "_dynamo_weak_dynamic_indices"):  # every layer of a prefill has the same plan
        return
    for part in (plan.tokens, plan.ring, plan.ema):
        for field in fields(part):
            value = getattr(part, field.name)
            if isinstance(value, Tensor):
                _vary([value], _VARYING.get(field.name, (0,)))
