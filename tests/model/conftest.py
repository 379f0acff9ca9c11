"""Fixtures for the tests of the model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing that another test compiled, and no falling back to eager mode."""
    torch.compiler.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch.compiler.reset()
