"""Counts what torch.compile compiled."""

from __future__ import annotations

from torch._dynamo.utils import counters


def graphs() -> int:
    """How many graphs were compiled since the last call. None may have a break."""
    assert not counters["graph_break"], dict(counters["graph_break"])
    count: int = counters["stats"]["unique_graphs"]
    counters.clear()
    return count
