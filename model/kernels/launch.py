"""How Triton kernels are launched: traceable by torch.export, and on a CPU under Triton's interpreter.

Every interface of Triton and torch that may change without notice is used in this module alone, with a comment that
says what breaks without it. `tests/kernels/test_launch.py` fails when one of them changes.

Programmatic dependent launch (PDL, sm_90 and later) lets a kernel start while the kernel before it still runs. A
captured CUDA graph has to ask for it (`runtimes/cuda_driver.py` of the package); elsewhere the two calls do nothing.

    launch_dependents      the next kernel of the CUDA stream may start from here on
    grid_dependency_wait   from here on, this kernel may read what earlier kernels wrote

Every kernel in this folder calls `grid_dependency_wait` before it reads what an earlier kernel wrote. It loads what no
kernel writes, such as weights, before that call, while the earlier kernel still runs.

With PDL, a kernel that launches early is placed on SMs that still have free resources and leaves others idle. Grids
that fill half of a GPU or more lose time by that. The kernels in front of such a grid leave `launch_dependents` out,
or call `launch_dependents_if_small`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from . import MAX_EARLY_BATCH

_MAX_EARLY_BATCH = tl.constexpr(MAX_EARLY_BATCH)  # kernels read globals that are constexpr, no others

TRITON_VERSION = tuple(int(number) for number in triton.__version__.split(".")[:2])

# Whether kernels are interpreted (TRITON_INTERPRET=1). Without this flag, interpreted kernels would go through
# wrap_triton, which accepts compiled kernels only.
INTERPRETED = triton.knobs.runtime.interpret

Record = Callable[[Any, tuple[Any, ...], tuple[Any, ...], dict[str, Any]], None]
_record: ContextVar[Record | None] = ContextVar("record", default=None)


@contextmanager
def recorded_launches(record: Record) -> Iterator[None]:
    """Call `record(function, grid, tensors, sizes)` for every launch, and launch nothing.

    Tensors may be on any device, and may be fake: what would be launched follows from shapes and dtypes. PDL is on.
    """
    token = _record.set(record)
    try:
        yield
    finally:
        _record.reset(token)


def launch(function: Any, grid: tuple[Any, ...]) -> Callable[..., None]:
    """The launcher of a @triton.jit function on a grid: `launch(function, grid)(*tensors, **sizes)`.

    A grid that is known to be empty launches nothing, and a traced program holds no such kernel.
    """
    if any(isinstance(size, int) and size == 0 for size in grid):
        return lambda *tensors, **sizes: None
    record = _record.get()
    if record is not None:
        return lambda *tensors, **sizes: record(function, grid, tensors, sizes)
    # wrap_triton makes the launch a node of a traced graph. Without it, torch.export and AOTInductor would see the
    # kernel's outputs as tensors that nothing writes.
    launcher: Callable[..., None] = (function if INTERPRETED else wrap_triton(function))[grid]
    return launcher


def supports_pdl(x: Tensor) -> bool:
    """Whether a tensor's device has programmatic dependent launch (NVIDIA, sm_90 and later)."""
    if _record.get() is not None:
        return True
    return x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] >= 9


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n: Triton's tiles have such sizes, what exceeds n is masked."""
    return triton.next_power_of_2(n)


# tl.extra.cuda.gdc_* are the PTX instructions griddepcontrol.*. A kernel without the wait reads its inputs before the
# kernel in front of it has written them, as soon as a CUDA graph links the two programmatically.
@triton.jit
def launch_dependents(PDL: tl.constexpr):
    """Let the next kernel of the CUDA stream start."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def launch_dependents_if_small(batch, PDL: tl.constexpr):
    """`launch_dependents` for a small batch, whose attention does not fill a GPU."""
    if PDL:  # noqa: SIM102 - decided when it is compiled
        if batch <= _MAX_EARLY_BATCH:
            tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def grid_dependency_wait(PDL: tl.constexpr):
    """Wait until earlier kernels of the CUDA stream have written their results."""
    if PDL:
        tl.extra.cuda.gdc_wait()
