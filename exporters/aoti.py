"""AOTInductor: both programs compiled to shared libraries without weights, and packed into one .pt2.

Each program is compiled in a process of its own (`python -m megalodon_export.exporters.aoti REQUEST`): the two run
side by side, and a compiler crash is an error message. Neither holds weights: a runtime binds every constant by name,
once for both.
"""

from __future__ import annotations

import functools
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..model import MegalodonForCausalLM, freeze_constants
from .programs import DECODE, PREFILL, Limits, export_program, sizes_of_one_are_not_special
from .workers import Worker, run_side_by_side, serve

PACKAGE = "model.pt2"
PORTABLE_FEATURES = ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "popcnt", "sse4_1", "sse4_2", "ssse3")
_FEATURE_PREFIXES = (*("avx", "amx", "bmi", "f16c", "fma", "movbe", "popcnt", "sse", "ssse3"), "asimd", "sve", "bf16")


@dataclass(frozen=True)
class Request:
    """One compilation: which program of which checkpoint, for which machine, to where."""

    checkpoint: str
    program: str
    device: str
    dtype: str
    limits: Limits
    all_logits: bool
    portable: bool
    directory: str


def inductor_options(request: Request) -> dict[str, Any]:
    """What AOTInductor is told, and why."""
    options: dict[str, Any] = {
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,  # weights stay in model.safetensors, one copy for both programs
        "aot_inductor.check_lowerbound": False,  # with the check, a program refuses batch 1
        "aot_inductor.model_name_for_generated_files": request.program,
        "cpp.dynamic_threads": True,  # else the number of threads of this machine is compiled in
    }
    if request.portable:
        options |= {"cpp.simdlen": 256, "cpp.march": "x86-64-v3"}
    return options


def _widen_inductor_caches() -> None:
    """Inductor remembers 128 simplified indices and strides; a prefill has thousands, and forgets them all in turn."""
    import torch._inductor.sizevars as sizevars

    for name in ("stride_at", "simplify_index_in_vec_range"):
        original = getattr(getattr(sizevars, name, None), "__wrapped__", None)
        if original is not None:
            setattr(sizevars, name, functools.cache(original))


def compile_program(request: Request, note: Callable[[str], None]) -> list[str]:
    """Export and compile one program in this process; the files AOTInductor made, without sources."""
    started = time.monotonic()
    model = MegalodonForCausalLM.from_pretrained(request.checkpoint, dtype=getattr(torch, request.dtype))
    model = model.eval().requires_grad_(False).to(request.device)
    freeze_constants(model)
    exported = export_program(model, request.program, request.limits, request.all_logits)
    note(f"exported in {time.monotonic() - started:.1f} s, {len(exported.graph.nodes)} nodes; compiling")
    _widen_inductor_caches()
    started = time.monotonic()
    with torch.no_grad(), sizes_of_one_are_not_special():
        files = torch._inductor.aot_compile(
            exported.module(), *exported.example_inputs, options=inductor_options(request)
        )
    note(f"compiled in {time.monotonic() - started:.1f} s")
    # Sources name paths of the build machine, and a loader that misses the library would try to compile them.
    paths = [str(file) for file in files]  # type: ignore[union-attr]
    return [path for path in paths if not path.endswith((".cpp", ".h", ".hpp"))]


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
    """Compile both programs of a checkpoint into `directory` (model.pt2, prefill.so, decode.so).

    Returns the manifest's entry about them: target machine, limits, files. CompileError if a compilation fails.
    """
    from torch.export.pt2_archive._package import package_pt2

    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=directory) as scratch:
        workers = []
        for name in (PREFILL, DECODE):
            folder = Path(scratch, name)
            request = Request(str(checkpoint), name, device, dtype, limits, all_logits, portable, str(folder))
            workers.append(Worker(name, __name__, asdict(request), folder))
        report(f"exporting and compiling {PREFILL} and {DECODE} for {device}, side by side")
        files: dict[str, list[str]] = run_side_by_side(workers, report)
        package_pt2(str(directory / PACKAGE), aoti_files={name: list(paths) for name, paths in files.items()})
        for name, paths in files.items():
            for path in paths:
                if path.endswith((".so", ".cubin")):
                    suffix = Path(path).suffix
                    shutil.copyfile(path, directory / (f"{name}.so" if suffix == ".so" else Path(path).name))
    return {
        "target": target(device, portable),
        "limits": asdict(limits),
        "package": PACKAGE,
        "libraries": {name: f"{name}.so" for name in files},
        "all_logits": all_logits,
    }


def constant_names(package: Path, programs: Iterable[str]) -> dict[str, list[str]]:
    """The names of the constants that each program of a package wants bound."""
    from torch._C._aoti import AOTIModelPackageLoader

    return {name: AOTIModelPackageLoader(str(package), name, True, 1, -1).get_constant_fqns() for name in programs}


def target(device: str, portable: bool) -> dict[str, Any]:
    """What a machine needs to run programs compiled here: device kind, and CPU features or GPU architecture."""
    if torch.device(device).type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return {"device": "cuda", "architecture": f"sm_{major}{minor}"}
    features = sorted(set(cpu_features()) & set(PORTABLE_FEATURES)) if portable else cpu_features()
    return {"device": "cpu", "architecture": platform.machine(), "cpu_features": features}


def cpu_features() -> list[str]:
    """Instruction-set extensions of this CPU that a compiler may use (`-march=native`); empty where unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    flags = next((line.split(":")[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return sorted(flag for flag in flags if flag.startswith(_FEATURE_PREFIXES))


def _serve(request: dict[str, Any], folder: Path, note: Callable[[str], None]) -> list[str]:
    return compile_program(Request(**{**request, "limits": Limits(**request["limits"])}), note)


if __name__ == "__main__":
    serve(_serve)
