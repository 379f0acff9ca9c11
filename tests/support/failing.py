"""Runtimes that fail when they are told to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def fail_at(call: int, run: Callable[..., Tensor], error: BaseException) -> Callable[..., Tensor]:
    """`run`, which raises the error at its call of that number (from 1)."""
    calls = iter(range(1, 100))

    def failing(*arguments: Any) -> Tensor:
        if next(calls) == call:
            raise error
        return run(*arguments)

    return failing
