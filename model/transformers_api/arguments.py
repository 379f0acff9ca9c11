"""The arguments that transformers passes to `forward`: some are used, some left alone, some refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cache import MegalodonCache
from .packing import PACKING, PackedLayout
from .padding import PaddingLayout

Layout = PaddingLayout | PackedLayout

# Arguments that transformers passes to every model, and that this one has no use for: generate() hands on the tokenizer
# of `stop_strings`, tokenizers make token_type_ids, and a collator of packed sequences the lengths of its documents.
_LEFT_ALONE = (
    *("tokenizer", "assistant_tokenizer", "token_type_ids", "max_length_q", "max_length_k", "cache_position"),
    *("output_attentions", "output_router_logits"),
)


def one_input(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """input_ids (B, L) or inputs_embeds (B, L, D), of which exactly one is given; ValueError also for empty ones."""
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(f"forward takes input_ids or inputs_embeds, and {given} of them came; give one")
    name, tokens = ("input_ids", input_ids) if input_ids is not None else ("inputs_embeds", inputs_embeds)
    assert tokens is not None
    dims = 2 if name == "input_ids" else 3
    if not torch.compiler.is_compiling() and (tokens.dim() != dims or 0 in tokens.shape):
        expected = "(batch, tokens)" if dims == 2 else "(batch, tokens, model_dim)"
        raise ValueError(
            f"{name} has shape {tuple(tokens.shape)}, expected {expected} with at least one row and one token"
        )
    return tokens


def one_cache(past_key_values: Any, cache: Any) -> MegalodonCache | None:
    """The cache under either of its names; TypeError if it is another model's."""
    given = past_key_values if cache is None else cache
    if given is None or isinstance(given, MegalodonCache):
        return given
    raise TypeError(
        f"past_key_values is a {type(given).__name__}, and Megalodon's cache is a running state of its own class: pass "
        "model.new_cache(batch), or leave it out"
    )


def take_layout(
    tokens: Tensor,
    attention_mask: Tensor | None,
    lengths: Tensor | None,
    cache: MegalodonCache | None,
    arguments: dict[str, Any],
) -> Layout:
    """Where the tokens are, from the mask or from the arguments of packed sequences, which are taken out.

    `position_ids` may say packed sequences too. Otherwise they have to say what the mask and the cache say.
    """
    if cache is not None:
        cache.check_batch(tokens.shape[0])
    layout = PaddingLayout.of(tokens, attention_mask, lengths)
    positions = arguments.pop("position_ids", None)
    packing = {name: arguments.pop(name, None) for name in PACKING}
    if torch.compiler.is_compiling():  # values cannot be looked at
        _refuse_packing(packing, "torch.compile(model) and exports; model.compile() serves them")
        return layout
    if positions is not None:
        positions = _as_rows(positions, *tokens.shape[:2])
        if cache is None and layout.lengths is None and bool((positions[:, 1:] == 0).any()):
            packing["position_ids"] = positions
    packed = PackedLayout.of(tokens, packing)
    if packed is not None and (cache is not None or layout.lengths is not None):
        _refuse_packing(packing, "a cache" if cache is not None else "padding")
    if positions is not None:
        _check_positions(positions, packed or layout, cache)
    return packed or layout


def _refuse_packing(packing: dict[str, Any], reason: str) -> None:
    given = [name for name, value in packing.items() if value is not None]
    if given:
        raise ValueError(
            f"{', '.join(given)}: packed sequences do not go with {reason}; every document is a fresh stream of tokens"
        )


def _as_rows(positions: Tensor, batch: int, length: int) -> Tensor:
    """position_ids of one row for all, or of every row: (B, L)."""
    if tuple(positions.shape) not in ((length,), (1, length), (batch, length)):
        raise ValueError(
            f"position_ids has shape {tuple(positions.shape)}, expected ({batch}, {length}), or ({length}) for all rows"
        )
    return positions.expand(batch, length)


def _check_positions(positions: Tensor, layout: Layout, cache: MegalodonCache | None) -> None:
    """ValueError unless `positions` (B, L) count each stream's tokens; those of padding may be anything."""
    batch, length = positions.shape
    expected = torch.arange(length, device=positions.device).expand(batch, length)
    valid = torch.ones_like(positions, dtype=torch.bool)
    if isinstance(layout, PackedLayout):
        starts = layout.starts.repeat_interleave(layout.counts)
        expected = (torch.arange(batch * length, device=starts.device) - starts).view(batch, length)
    elif layout.lengths is not None:
        valid = layout.valid(length)
        expected = expected if layout.place is None else layout.place
    if cache is not None:
        expected = expected + cache.position.to(expected.device)[:, None]
    wrong = (valid & (positions != expected)).any(1)
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        raise ValueError(
            f"position_ids of row {row} are {_short(positions[row])}, and its tokens are at {_short(expected[row])}; "
            "positions follow from attention_mask and the cache, so leave position_ids out"
        )


def _short(values: Tensor) -> str:
    listed = ", ".join(map(str, values[:6].tolist()))
    return f"[{listed}, ...]" if len(values) > 6 else f"[{listed}]"


def refuse_others(arguments: dict[str, Any]) -> None:
    """TypeError for arguments that this model does not have; ValueError for `is_causal` False."""
    if arguments.get("is_causal") is False:
        raise ValueError("is_causal is False, and Megalodon is causal: each token sees those before it alone")
    known = (*_LEFT_ALONE, "is_causal")
    given = [n for n, value in arguments.items() if n not in known and value is not None and value is not False]
    if given:
        raise TypeError(f"Megalodon's forward has no argument {', '.join(given)}; leave it out")
