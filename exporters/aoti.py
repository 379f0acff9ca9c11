"""AOTInductor: the stages of both programs compiled to shared libraries without weights, and packed into one .pt2.

Each program is compiled in a process of its own (`python -m megalodon_export.exporters.aoti REQUEST`): the two run
side by side, and a compiler crash is an error message. No stage holds weights: they are inputs, and a runtime passes
the same tensors to all.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..model import MegalodonConfig, MegalodonForCausalLM, freeze_constants, use_kernels
from .gemv_rewrite import stream_products
from .programs import DECODE, DECODE_ONE, PREFILL, Limits
from .stages import Stage, export_stages
from .target import target
from .torch_internals import compile_graph, package_programs, stand_in_sources
from .workers import Worker, run_side_by_side, serve

PACKAGE = "model.pt2"


@dataclass(frozen=True)
class CompileRequest:
    """One compilation: which program of which checkpoint, for which machine, to where."""

    checkpoint: str
    program: str
    device: str
    dtype: str
    limits: Limits
    all_logits: bool
    portable: bool
    directory: str


def inductor_options(request: CompileRequest, stage: str) -> dict[str, Any]:
    """What AOTInductor is told, and why."""
    options: dict[str, Any] = {
        "aot_inductor.package": True,
        # a folder of its own: in the shared cache, Inductor takes the kernels of any stage with the same wrapper,
        # which does not name the sizes of its inputs
        "aot_inductor.output_path": str(Path(request.directory, stage)),
        "aot_inductor.package_constants_in_so": False,  # a stage has none; should one appear, `compile_stage` sees it
        "aot_inductor.check_lowerbound": False,  # with the check, a program refuses batch 1
        "aot_inductor.model_name_for_generated_files": stage,
        "cpp.dynamic_threads": True,  # else the number of threads of this machine is compiled in
    }
    if request.portable:
        options |= {"cpp.simdlen": 256, "cpp.march": "x86-64-v3"}
    return options


def one_layer_model(request: CompileRequest) -> MegalodonForCausalLM:
    """The checkpoint's first layer, embedding and head: all that a program's stages can depend on."""
    config = MegalodonConfig.from_pretrained(request.checkpoint)
    config.num_layers = 1
    logging.set_verbosity_error()  # it would list the weights of all other layers
    dtype = getattr(torch, request.dtype)
    model = MegalodonForCausalLM.from_pretrained(request.checkpoint, config=config, dtype=dtype)
    model = model.eval().requires_grad_(False).to(request.device)
    freeze_constants(model)
    return model


def compile_program(request: CompileRequest, note: Callable[[str], None]) -> dict[str, Any]:
    """Compile the stages of one program of a checkpoint in this process; see `compile_stages`."""
    return compile_stages(one_layer_model(request), request, note)


def compile_stages(
    model: MegalodonForCausalLM, request: CompileRequest, note: Callable[[str], None] = lambda message: None
) -> dict[str, Any]:
    """Export and compile the stages of one program of a frozen model of one layer, on the kernels where it is on a GPU.

    For each stage, its boundary and AOTInductor's files.
    """
    if model.device.type == "cuda":
        use_kernels(model)
    started = time.monotonic()
    stages = export_stages(model, request.program, request.limits, request.all_logits)
    if request.program != PREFILL and model.device.type == "cpu":
        for stage in stages.values():
            stream_products(stage.graph.graph)
            stage.graph.recompile()
    nodes = sum(len(stage.graph.graph.nodes) for stage in stages.values())
    note(f"exported in {time.monotonic() - started:.1f} s, {nodes} nodes; compiling")
    started = time.monotonic()
    compiled = {part: compile_stage(stage, inductor_options(request, stage.name)) for part, stage in stages.items()}
    note(f"compiled in {time.monotonic() - started:.1f} s")
    return compiled


def compile_stage(stage: Stage, options: dict[str, Any]) -> dict[str, Any]:
    """Compile one stage: its entry in the manifest, and the `files` that AOTInductor made, without sources."""
    files = compile_graph(stage.graph, stage.examples, options)
    return {
        "name": stage.name,
        "library": f"{stage.name}.so",
        "inputs": [{k: v for k, v in asdict(i).items() if v is not None} for i in stage.inputs],
        "outputs": list(stage.outputs),
        "files": [file for file in files if not file.endswith((".cpp", ".h", ".hpp"))] + stand_in_sources(files),
    }


def build(
    checkpoint: Path,
    directory: Path,
    device: str,
    dtype: str,
    limits: Limits,
    report: Callable[[str], None],
    all_logits: bool = False,
    portable: bool = False,
) -> dict[str, Any]:
    """Compile both programs of a checkpoint into `directory` (model.pt2, and every stage as PROGRAM_STAGE.so).

    Returns the manifest's entry about them: target machine, limits, stages. CompileError if a compilation fails.
    """
    programs = (PREFILL, DECODE, DECODE_ONE)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=directory) as scratch:
        workers = []
        for name in programs:
            folder = Path(scratch, name)
            request = CompileRequest(str(checkpoint), name, device, dtype, limits, all_logits, portable, str(folder))
            workers.append(Worker(name, __name__, asdict(request), folder))
        report(f"exporting and compiling {', '.join(programs)} for {device}, side by side")
        compiled: dict[str, dict[str, Any]] = run_side_by_side(workers, report)
        stages = [stage for name in programs for stage in compiled[name].values()]
        files: dict[str, list[str]] = {stage["name"]: stage.pop("files") for stage in stages}
        package_programs(directory / PACKAGE, files)
        for name, paths in files.items():
            for path in paths:
                if path.endswith((".so", ".cubin")):
                    suffix = Path(path).suffix
                    shutil.copyfile(path, directory / (f"{name}.so" if suffix == ".so" else Path(path).name))
    return {
        "target": target(device, portable),
        "limits": asdict(limits),
        "package": PACKAGE,
        "all_logits": all_logits,
        "stages": compiled,
    }


def _serve(request: dict[str, Any], folder: Path, note: Callable[[str], None]) -> dict[str, Any]:
    return compile_program(CompileRequest(**{**request, "limits": Limits(**request["limits"])}), note)


if __name__ == "__main__":
    serve(_serve)
