"""Values of a test's parameter of which some are marked slow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(values: Iterable[Any], *fast: Any) -> list[Any]:
    """The values as parameters, tuples as those of several; all but the fast ones are marked slow."""
    return [value if value in fast else _slow(*value) if isinstance(value, tuple) else _slow(value) for value in values]


def _slow(*value: Any) -> Any:
    return pytest.param(*value, marks=pytest.mark.slow)
