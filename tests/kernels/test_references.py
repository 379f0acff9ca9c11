"""Every operator of the kernels against its reference: under Triton's interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from megalodon_export.bundles.verify import BOUNDS
from support.kernel_operations import OPERATIONS, largest_difference


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (it comes with a CUDA build of torch)")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_interpreted_operators_equal_their_references(
    interpreted_kernels: dict[str, list[float]], operation: str
) -> None:
    assert max(interpreted_kernels[operation]) < bound(operation)


@pytest.mark.cuda
@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiled_operators_equal_their_references(operation: str) -> None:
    assert largest_difference(operation, "cuda") < bound(operation)


def bound(operation: str) -> float:
    """Of a relative difference: results in bfloat16 may be two roundings apart."""
    return 2**-6 if operation.endswith("in bfloat16") else BOUNDS["float32"]
