"""Checkpoints of the original in several model-parallel parts, put together: its column and row splits undone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Which dimension of a tensor a part holds a piece of; everything else is in every part, and equal in all.
_SPLIT_DIMENSIONS = (
    (re.compile(r".*\.(wv|wz|wr|wh1|fc1|fc3)\.(weight|bias)"), 0),  # ColumnParallelLinear: output features
    (re.compile(r".*\.(wh2|fc2)\.weight|output\.output\.weight"), 1),  # RowParallelLinear: input features
    (re.compile(r"embed\.weight"), 1),  # ParallelEmbedding: the model's width
    (re.compile(r".*\.mega\.(gamma|beta)"), 1),  # by heads
    (re.compile(r".*\.cema\.(alpha|delta|theta|gamma|omega)"), 0),  # by channels
    (re.compile(r".*(timenorm|final_norm)\.(weight|bias|prior_mean|prior_logv)"), 0),
)


def split_dimension(name: str) -> int | None:
    """The dimension along which the original splits a tensor over its parts; None where each part has all of it."""
    return next((dim for pattern, dim in _SPLIT_DIMENSIONS if pattern.fullmatch(name)), None)


def merge_parts(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state dict from those of all parts, in their order. Source: megalodon/modules/model_parallel/layers.py.

    ValueError if the parts have other names than the first, or differ where they should be equal.
    """
    first, *others = parts
    for number, other in enumerate(others, 1):
        if unlike := sorted(first.keys() ^ other.keys()):
            raise ValueError(f"one of parts 0 and {number} lacks what the other has: {', '.join(unlike)}")
    return {name: _merge(name, [part[name] for part in parts]) for name in first}


def _merge(name: str, pieces: list[Any]) -> Any:
    if not all(isinstance(piece, Tensor) for piece in pieces):
        return pieces[0]
    dim = split_dimension(name)
    if dim is None:
        if not all(torch.equal(pieces[0], piece) for piece in pieces):
            raise ValueError(f"{name} should be the same in every part, and differs; are the parts of one checkpoint?")
        return pieces[0]
    if len({(piece.dtype, piece.shape) for piece in pieces}) > 1 or pieces[0].dim() <= dim:
        found = ", ".join(str(tuple(piece.shape)) for piece in pieces)
        raise ValueError(f"the pieces of {name} should have one shape, of more than {dim} dimensions; found {found}")
    return torch.cat(pieces, dim)
