"""How the Triton kernels are launched: traceable by torch.export, and on a CPU under Triton's interpreter.

No kernel of this folder touches what an earlier kernel of the stream wrote before its `wait`. Where kernels are linked
by programmatic edges (`runtimes/programmatic.py` of the package), the next one begins with this one's `start`, and
loads its weights while this one still runs; everywhere else both are free. A kernel that begins early has to take the
multiprocessors with room for it, not the idle ones. With many rows some kernels fill a GPU, or half of it, and lose
more by that than they gain: the kernels before those have no `start`, or `start_if_few`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from . import FEW

_FEW = tl.constexpr(FEW)
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def start(PDL: tl.constexpr):
    """Let the next kernel of the stream begin."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def start_if_few(batch, PDL: tl.constexpr):
    """`start` if the step has a few rows, whose kernels do not fill a GPU."""
    if PDL:  # noqa: SIM102 - decided when it is compiled
        if batch <= _FEW:
            tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """From here on, what earlier kernels of the stream wrote can be read."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def silu(x):
    """x sigmoid(x)."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def inverse_root(x, eps):
    """1 / sqrt(x + eps) in float32, also where eps comes as float64, as it does in a compiled program."""
    return 1.0 / tl.sqrt(x + tl.cast(eps, tl.float32))


class kernel:
    """The launcher of a @triton.jit function, traceable unless it is interpreted: `kernel(function)[grid](...)`.

    A grid that is known to be empty launches nothing, and a program that is traced has no such kernel.
    """

    def __init__(self, function: Any) -> None:
        self._launcher = function if INTERPRETED else wrap_triton(function)

    def __getitem__(self, grid: tuple[Any, ...]) -> Callable[..., None]:
        if any(isinstance(size, int) and size == 0 for size in grid):
            return lambda *tensors, **sizes: None
        launch: Callable[..., None] = self._launcher[grid]
        return launch


def programmatic(x: Tensor) -> bool:
    """Whether the device has programmatic dependent launch (sm_90 on)."""
    return x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] >= 9


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n: tiles have such sizes, the rest is masked."""
    return triton.next_power_of_2(n)


def group_sizes(dim: int, groups: int, channels: int) -> dict[str, int]:
    """Sizes of a kernel that takes whole groups of a TimestepNorm, some `channels` in a program."""
    group = dim // groups
    padded = power_of_2(group)
    per_program = min(max(channels // padded, 1), power_of_2(groups))
    return {"G": groups, "GROUP": group, "GROUP_P": padded, "GROUPS": per_program}
