"""AOTInductor: the stages of all programs compiled to shared libraries without weights, and packed into one .pt2.

    build(checkpoint, bundle / "aoti", "cpu", "float32", limits, print)
    -> bundle/aoti/model.pt2, prefill_begin.so, prefill_layer.so, prefill_end.so, decode_begin.so, ...

Each program is compiled in a process of its own (`python -m megalodon_export.exporters.aoti REQUEST`): they run side by
side, and a compiler that crashes gives an error message. No stage holds weights: they are inputs, and a runtime passes
the same tensors to all stages.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from ..model import MegalodonForCausalLM, use_kernels
from .gemv_rewrite import rewrite_gemv
from .manifest_types import PACKAGE, AotiPrograms, CompiledProgram, CompiledStage, Record
from .programs import DECODE, DECODE_ONE, PREFILL, Limits, ProgramName
from .scratch import scratch_folder
from .stages import Stage, export_stages, one_layer_model
from .target import target
from .torch_internals import compile_graph, package_programs, stand_in_sources
from .workers import Worker, run_side_by_side, serve


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


class StageFiles(Record, frozen=True):
    """A compiled stage: its entry in the manifest, and the files that AOTInductor made, without sources."""

    entry: CompiledStage
    files: tuple[str, ...]


def inductor_options(request: CompileRequest, stage: str) -> dict[str, Any]:
    """AOTInductor's options for one stage."""
    options: dict[str, Any] = {
        "aot_inductor.package": True,
        # A folder per stage. In a shared one, Inductor reuses the kernels of another stage whose wrapper is the same
        # text, and that text does not name the sizes of the inputs.
        "aot_inductor.output_path": str(Path(request.directory, stage)),
        "aot_inductor.package_constants_in_so": False,  # a stage has none; should one appear, `compile_stage` sees it
        "aot_inductor.check_lowerbound": False,  # with the check, a program refuses batch 1
        "aot_inductor.model_name_for_generated_files": stage,
        "cpp.dynamic_threads": True,  # else the number of threads of this machine is compiled in
        # Code that Inductor generates for one thread computes wrong numbers on two, where sums are shared out.
        "cpp.threads": max(2, torch.get_num_threads()),
    }
    if request.portable:
        options |= {"cpp.simdlen": 256, "cpp.march": "x86-64-v3"}
    return options


def compile_program(request: CompileRequest, note: Callable[[str], None]) -> dict[str, StageFiles]:
    """Compile the stages of one program of a checkpoint in this process; see `compile_stages`."""
    return compile_stages(one_layer_model(request.checkpoint, request.device, request.dtype), request, note)


def compile_stages(
    model: MegalodonForCausalLM, request: CompileRequest, note: Callable[[str], None] = lambda message: None
) -> dict[str, StageFiles]:
    """Export and compile the stages of one program of a frozen model of one layer. On a GPU it runs on the kernels."""
    if model.device.type == "cuda":
        use_kernels(model)
    started = time.monotonic()
    stages = export_stages(model, request.program, request.limits, request.all_logits)
    if request.program != PREFILL and model.device.type == "cpu":
        for stage in stages.values():
            rewrite_gemv(stage.graph.graph)
            stage.graph.recompile()
    nodes = sum(len(stage.graph.graph.nodes) for stage in stages.values())
    note(f"exported in {time.monotonic() - started:.1f} s, {nodes} nodes; compiling")
    started = time.monotonic()
    compiled = {part: compile_stage(stage, inductor_options(request, stage.name)) for part, stage in stages.items()}
    note(f"compiled in {time.monotonic() - started:.1f} s")
    return compiled


def compile_stage(stage: Stage, options: dict[str, Any]) -> StageFiles:
    """Compile one stage with AOTInductor."""
    files = compile_graph(stage.graph, stage.examples, options)
    kept = [file for file in files if not file.endswith((".cpp", ".h", ".hpp"))]
    entry = CompiledStage(stage.name, f"{stage.name}.so", stage.inputs, stage.outputs)
    return StageFiles(entry, (*kept, *stand_in_sources(files)))


def build(
    checkpoint: Path,
    directory: Path,
    device: str,
    dtype: str,
    limits: Limits,
    report: Callable[[str], None],
    all_logits: bool = False,
    portable: bool = False,
) -> AotiPrograms:
    """Compile both programs of a checkpoint into `directory` (model.pt2, and every stage as PROGRAM_STAGE.so).

    Returns the manifest's entry about them; where the weights are is left open. CompileError if a compilation fails.
    """
    programs: tuple[ProgramName, ...] = (PREFILL, DECODE, DECODE_ONE)
    directory.mkdir(parents=True, exist_ok=True)
    with scratch_folder(directory) as scratch:
        workers = []
        for name in programs:
            folder = scratch.folder / name
            request = CompileRequest(str(checkpoint), name, device, dtype, limits, all_logits, portable, str(folder))
            workers.append(Worker(name, __name__, asdict(request), folder, scratch.environment))
        report(f"exporting and compiling {', '.join(programs)} for {device}, side by side")
        compiled = msgspec.convert(run_side_by_side(workers, report), dict[ProgramName, dict[str, StageFiles]])
        files = {stage.entry.name: stage.files for name in programs for stage in compiled[name].values()}
        package_programs(directory / PACKAGE, {name: list(paths) for name, paths in files.items()})
        for stage_name, paths in files.items():
            for path in paths:
                if (file := _loaded_name(Path(path), stage_name)) is not None:
                    shutil.copyfile(path, directory / file)
    stages = {
        name: CompiledProgram(**{part: stage.entry for part, stage in compiled[name].items()}) for name in programs
    }
    return AotiPrograms(target(device, portable), limits, PACKAGE, all_logits, stages)


def _loaded_name(path: Path, stage: str) -> str | None:
    """The name in a bundle of a file that a runtime loads; None for one that only the package needs.

    The JSON lists operators that a library calls by name, such as an FFT. torch looks for it beside the library.
    """
    if path.suffix in (".so", ".json"):
        return None if path.name.endswith("_metadata.json") else f"{stage}{path.suffix}"
    return path.name if path.suffix == ".cubin" else None


def _serve(request: dict[str, Any], folder: Path, note: Callable[[str], None]) -> dict[str, Any]:
    compiled: dict[str, Any] = msgspec.to_builtins(compile_program(msgspec.convert(request, CompileRequest), note))
    return compiled


if __name__ == "__main__":
    serve(_serve)
