"""Graphs with kernels beside a bundle's plain graphs: prefill and decode, the kernels' file, the operator library.

    build(folder, "bfloat16", limits, ("sm_90",), print)
    -> folder/prefill_kernels.onnx, decode_kernels.onnx, onnx_kernels.bin, onnx_kernels.so

The stages are those of AOTInductor's programs for a GPU, traced on a CPU: what a kernel's launch needs follows from
shapes and dtypes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...model import MegalodonConfig
from ...model.kernels import use_kernels
from ...model.kernels.launch import INTERPRETED, recorded_launches
from ..onnx.build_graphs import build_graph, save_graph
from ..onnx.cuda_placement import require
from ..onnx.weight_files import ExternalWeights
from ..onnx_names import KERNEL_LIBRARY, KERNELS_FILE, kernel_graph_file, with_next_tokens
from ..programs import DECODE, PREFILL, Limits, ProgramName, program_specs
from ..stages import export_stages, one_layer_model
from . import handlers
from .last_tokens import replace_indexing
from .library import build_library
from .machine_code import check_architectures, compile_kernels, write_kernels
from .pointwise import fuse
from .recording import Kernel


def build(
    folder: Path,
    files: tuple[str, ...],
    dtype: str,
    limits: Limits,
    architectures: tuple[str, ...],
    report: Callable[[str], None],
    all_logits: bool = False,
    library_flags: tuple[str, ...] = (),
) -> dict[str, Kernel]:
    """Write both graphs, their kernels and the operator library into `folder`; returns the kernels by name.

    `files` hold the weights. ValueError for an unknown architecture or a model that the kernels do not run,
    CompileError without a C++ compiler.
    """
    if INTERPRETED:
        raise ValueError("TRITON_INTERPRET is set, and interpreted kernels have no machine code; unset it")
    config = MegalodonConfig.from_pretrained(folder)
    wanted = check_architectures(architectures)
    build_library(folder / KERNEL_LIBRARY, library_flags)
    weights = ExternalWeights(folder, files)
    model = one_layer_model(folder, "cpu", dtype)
    try:
        use_kernels(model)
    except TypeError as error:
        raise ValueError(f"--kernels: {error}") from error
    specs = program_specs(config, getattr(torch, dtype), all_logits)
    kernels: dict[str, Kernel] = {}
    names: tuple[ProgramName, ...] = (PREFILL, DECODE)
    for name in names:
        started = time.monotonic()
        shared: dict[Any, Any] = {handlers.KERNELS: kernels}
        with recorded_launches(_ignore):
            stages = export_stages(model, name, limits, all_logits)
        for stage in stages.values():
            fuse(stage.graph.graph)
            replace_indexing(stage.graph.graph)
        graph = build_graph(with_next_tokens(specs[name]), stages, config, weights, limits, shared)
        require(graph)
        save_graph(graph, folder / kernel_graph_file(name))
        report(f"{name} with kernels: {len(graph)} nodes in {time.monotonic() - started:.1f} s")
    write_kernels(folder / KERNELS_FILE, compile_kernels(kernels.values(), wanted, report))
    return kernels


def _ignore(*launch: Any) -> None:
    """Launch nothing, and record nothing: tracing needs shapes alone."""
