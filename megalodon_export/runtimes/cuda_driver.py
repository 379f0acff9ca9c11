"""Programmatic dependent launch (PDL) for a captured CUDA graph: a kernel launches while the one before it still runs.

The kernels of `model/kernels` load their weights before `grid_dependency_wait`, where they wait for the kernel that
they depend on. Compiled programs launch kernels without PDL, so each would start after the one before it has ended.
Here the edges between kernels of a captured graph are changed to programmatic ones. An edge changes only if the kernel
behind it waits by itself.

This module is the one user of the CUDA driver's structures, by ctypes: torch has no interface to a graph's edges.
Without it, captured graphs give the same numbers, and each kernel's loads of weights no longer overlap with the kernel
before it. Layouts and values are those of cuda.h for CUDA 12.3 and later.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from ..model.kernels import KERNEL_PREFIX

_KERNEL_NODE = 0  # CU_GRAPH_NODE_TYPE_KERNEL


class _EdgeData(ctypes.Structure):
    """CUgraphEdgeData: which event of the first node launches the second."""

    _fields_ = (
        ("from_port", ctypes.c_ubyte),
        ("to_port", ctypes.c_ubyte),
        ("type", ctypes.c_ubyte),
        ("reserved", ctypes.c_ubyte * 5),
    )


# The second kernel launches when every block of the first has called `launch_dependents` or has ended:
# CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC of an edge of type CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC.
_PROGRAMMATIC = _EdgeData(from_port=1, type=1)


class _KernelParams(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2; `func` or `kern` is read."""

    _fields_ = (
        ("func", ctypes.c_void_p),
        ("sizes", ctypes.c_uint * 7),
        ("kernel_params", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("kern", ctypes.c_void_p),
        ("ctx", ctypes.c_void_p),
    )


def use_dependent_launch(graph: torch.cuda.CUDAGraph) -> int:
    """Make the edges into kernels that wait programmatic, in a graph that is captured and not instantiated yet.

    Returns their number: 0, with the graph unchanged, where the driver or the GPU (before sm_90) has no such edges.
    """
    if torch.version.hip is not None or torch.cuda.get_device_capability()[0] < 9:
        return 0
    driver = ctypes.CDLL("libcuda.so.1")
    if not hasattr(driver, "cuGraphGetEdges_v2"):
        return 0
    handle = ctypes.c_void_p(graph.raw_cuda_graph())
    changed = 0
    for first, second, data in _edges(driver, handle):
        plain = data.type == 0 and data.from_port == 0
        if plain and _kernel_name(driver, first) and _kernel_name(driver, second).startswith(KERNEL_PREFIX.encode()):
            ends = ctypes.byref(first), ctypes.byref(second)
            _check(driver, driver.cuGraphRemoveDependencies_v2(handle, *ends, ctypes.byref(data), ctypes.c_size_t(1)))
            new = _EdgeData.from_buffer_copy(_PROGRAMMATIC)
            _check(driver, driver.cuGraphAddDependencies_v2(handle, *ends, ctypes.byref(new), ctypes.c_size_t(1)))
            changed += 1
    return changed


def _edges(driver: Any, graph: ctypes.c_void_p) -> list[tuple[ctypes.c_void_p, ctypes.c_void_p, _EdgeData]]:
    count = ctypes.c_size_t(0)
    _check(driver, driver.cuGraphGetEdges_v2(graph, None, None, None, ctypes.byref(count)))
    firsts, seconds = (ctypes.c_void_p * count.value)(), (ctypes.c_void_p * count.value)()
    data = (_EdgeData * count.value)()
    _check(driver, driver.cuGraphGetEdges_v2(graph, firsts, seconds, data, ctypes.byref(count)))
    return [(ctypes.c_void_p(firsts[i]), ctypes.c_void_p(seconds[i]), data[i]) for i in range(count.value)]


def _kernel_name(driver: Any, node: ctypes.c_void_p) -> bytes:
    """The name of a node's kernel; empty for a node of another type."""
    kind = ctypes.c_int(-1)
    _check(driver, driver.cuGraphNodeGetType(node, ctypes.byref(kind)))
    if kind.value != _KERNEL_NODE:
        return b""
    params, name = _KernelParams(), ctypes.c_char_p()
    _check(driver, driver.cuGraphKernelNodeGetParams_v2(node, ctypes.byref(params)))
    if params.func:
        _check(driver, driver.cuFuncGetName(ctypes.byref(name), ctypes.c_void_p(params.func)))
    else:
        _check(driver, driver.cuKernelGetName(ctypes.byref(name), ctypes.c_void_p(params.kern)))
    return name.value or b""


def _check(driver: Any, status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"the CUDA driver refused to change a captured graph: {(text.value or b'').decode()}")
