"""Functions of single numbers that several kernels apply."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def silu(x):
    """x sigmoid(x)."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def rsqrt(x, eps):
    """1 / sqrt(x + eps) in float32. Compiled programs pass eps as float64, which would make all of it float64."""
    return 1.0 / tl.sqrt(x + tl.cast(eps, tl.float32))
