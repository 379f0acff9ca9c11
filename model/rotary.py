"""Rotary position embedding (RoPE, arXiv 2104.09864), in the half-split layout.

    (a, b) -> (a cos - b sin, b cos + a sin)        angle of pair j at position t: t base^(-2j / dz)

Attention stays inside a chunk, so positions count from its start.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .constants import DerivedConstants
from .norm import accumulation_dtype


class Rotary(NamedTuple):
    """Cosines and sines (..., dz/2) of some positions."""

    cos: Tensor
    sin: Tensor


class RotaryTable(DerivedConstants):
    """Cosines and sines (C, dz/2) of the positions inside a chunk, computed in float64."""

    anchor: Tensor

    def __init__(self, head_dim: int, chunk_size: int, base: float | None) -> None:
        super().__init__()
        self.head_dim, self.chunk_size, self.base = head_dim, chunk_size, base or 10_000.0
        self.register_buffer("anchor", torch.zeros(0), persistent=False)  # follows the device, and float64

    def derive(self) -> dict[str, Tensor]:
        """The two tables."""
        device = self.anchor.device
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=device)
        positions = torch.arange(self.chunk_size, dtype=torch.float64, device=device)
        angle = torch.outer(positions, self.base ** (-pairs / self.head_dim))
        dtype = accumulation_dtype(self.anchor.dtype)
        return {"cos": torch.cos(angle).to(dtype), "sin": torch.sin(angle).to(dtype)}

    def forward(self, positions: Tensor) -> Rotary:
        """Rows of the tables for absolute positions (...): (..., dz/2) each."""
        table = self.constants()
        slots = positions % self.chunk_size
        return Rotary(table["cos"][slots], table["sin"][slots])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (j, j + dz/2) of the last dimension of x by the given angles (half-split layout)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
