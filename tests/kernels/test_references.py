"""Every operator of the kernels against its reference: under Triton's interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from megalodon_export.bundles.verify import BOUNDS
from support.kernel_operations import OPERATIONS, largest_difference
from support.kernel_processes import run_interpreted


@pytest.fixture(scope="module")
def interpreted() -> dict[str, float]:
    """The largest difference of each operator from its reference."""
    done = run_interpreted("kernel_operations")
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: float(found) for name, found in map(str.split, done.stdout.splitlines())}


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (it comes with a CUDA build of torch)")
@pytest.mark.parametrize("name", OPERATIONS)
def test_interpreted_operators_equal_their_references(interpreted: dict[str, float], name: str) -> None:
    assert interpreted[name] < BOUNDS["float32"]


@pytest.mark.cuda
@pytest.mark.parametrize("name", OPERATIONS)
def test_compiled_operators_equal_their_references(name: str) -> None:
    assert largest_difference(name, "cuda") < BOUNDS["float32"]
