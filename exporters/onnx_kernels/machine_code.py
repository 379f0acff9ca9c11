"""Kernels compiled for GPUs that are not here, and the file that holds them.

Triton needs no GPU to compile: the target is an argument, and the assembler comes with Triton. Machine code fits one
architecture. PTX of the oldest one stands beside it, which the driver compiles for every other GPU that is newer.

    megalodon-kernels 1 4096                                   what the file is, its version, bytes of the lines
    kernel megalodon_argmax.a2a23f88cb7c megalodon_argmax sm_90 0 10240 1024 64 2 1
    ...
    machine code                                               from byte 4096 on

A line has the kernel's name, its function's symbol, its architecture ("ptx" for the text), the place and the size of
the code, the bytes of shared memory and the threads of a block, the null pointers that follow the arguments, and 1 if
it may be launched with PDL.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ...model.kernels import PDL_CONSTEXPR
from ..onnx_names import GPU_ARCHITECTURES
from ..torch_internals import compile_triton, triton_version
from .recording import Kernel

PTX = "ptx"
_FIRST_WITH_PDL = 90
# The most shared memory that a block may have, in bytes (CUDA C++ Programming Guide, technical specifications).
_SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
_TRITONS_POINTERS = 2  # global and profile scratch, which no kernel of ours uses
_ALIGNMENT = 256  # of each kernel's code in the file


@dataclass(frozen=True)
class Code:
    """A kernel's code for one architecture, or its PTX."""

    kernel: str
    symbol: str
    architecture: str
    code: bytes
    shared: int
    threads: int
    pointers: int
    pdl: bool


class NoRoomError(ValueError):
    """A kernel needs more shared memory than a GPU has; the text says how much."""


def check_architectures(names: Sequence[str]) -> tuple[str, ...]:
    """The names in ascending order; ValueError for one that is unknown, or for none."""
    unknown = [name for name in names if name not in GPU_ARCHITECTURES]
    if unknown or not names:
        found = f"{unknown[0]!r} is none" if unknown else "none is given"
        raise ValueError(f"kernels are compiled for architectures of {', '.join(GPU_ARCHITECTURES)}; {found}")
    return tuple(name for name in GPU_ARCHITECTURES if name in names)


def compile_kernel(kernel: Kernel, architecture: str) -> list[Code]:
    """A kernel's machine code for an architecture, and the PTX on the way to it.

    NoRoomError if it needs more shared memory than such a GPU has.
    """
    number = int(architecture.removeprefix("sm_"))
    pdl = number >= _FIRST_WITH_PDL
    constants = dict(kernel.constants)
    if PDL_CONSTEXPR in constants:
        constants[PDL_CONSTEXPR] = pdl
    about, machine_code, ptx = compile_triton(
        kernel.function, dict(kernel.types), constants, kernel.aligned, number, dict(kernel.options)
    )
    if getattr(about, "global_scratch_size", 0) or tuple(getattr(about, "cluster_dims", (1, 1, 1))) != (1, 1, 1):
        raise ValueError(f"{kernel.name} needs scratch memory or clusters, which the operator library does not give")
    most = _SHARED_MEMORY[number]
    if about.shared > most:
        raise NoRoomError(f"{kernel.name} needs {about.shared} bytes of shared memory, {architecture} has {most}")
    facts = int(about.shared), 32 * int(about.num_warps), _pointers(kernel, ptx)
    codes = [(architecture, machine_code), (PTX, ptx.encode() + b"\0")]
    return [Code(kernel.name, about.name, name, code, *facts, pdl) for name, code in codes]


def _pointers(kernel: Kernel, ptx: str) -> int:
    """Parameters of the compiled kernel behind those that it declares; ValueError for another number than is known."""
    declared = sum(kind != "constexpr" for _, kind in kernel.types)
    found = ptx[ptx.index(".entry") : ptx.index("{", ptx.index(".entry"))].count(".param")
    if found not in (declared, declared + 1, declared + _TRITONS_POINTERS):
        raise ValueError(f"Triton {triton_version()} gives {kernel.name} {found} parameters, {declared} are declared")
    return found - declared


def compile_kernels(
    kernels: Iterable[Kernel], architectures: tuple[str, ...], report: Callable[[str], None]
) -> list[Code]:
    """All kernels for all architectures, and the PTX of the oldest one.

    An architecture that has no room for one of the kernels is left out. NoRoomError if none is left.
    """
    unique = {kernel.name: kernel for kernel in kernels}
    codes: list[Code] = []
    failure: NoRoomError | None = None
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:  # the assembler is a process of its own
        for architecture in architectures:
            try:
                pairs = list(pool.map(lambda kernel, name=architecture: compile_kernel(kernel, name), unique.values()))
            except NoRoomError as error:
                failure = error
                report(f"no kernels for {architecture}: {error}")
                continue
            codes += [code for pair in pairs for code in pair if code.architecture != PTX or not codes]
    if failure is not None and not codes:
        raise failure
    made = ", ".join(dict.fromkeys(code.architecture for code in codes if code.architecture != PTX))
    report(f"{len(unique)} kernels compiled for {made} by Triton {triton_version()}")
    return codes


def write_kernels(path: Path, codes: Iterable[Code]) -> None:
    """Write the kernels' file."""
    lines, data = [], bytearray()
    for one in codes:
        facts = one.shared, one.threads, one.pointers, int(one.pdl)
        place = len(data), len(one.code)
        lines.append(" ".join(map(str, ("kernel", one.kernel, one.symbol, one.architecture, *place, *facts))))
        data += one.code + bytes(-len(one.code) % _ALIGNMENT)
    text = "".join(line + "\n" for line in lines).encode()
    size = -(-(len(text) + 64) // _ALIGNMENT) * _ALIGNMENT
    head = f"megalodon-kernels 1 {size}\n".encode() + text
    path.write_bytes(head + b"\n" * (size - len(head)) + bytes(data))
