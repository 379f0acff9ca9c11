"""The doctor's probes, one function per process: python -P probes.py FOLDER TITLE FUNCTION [ARGUMENT...]

A probe appends each check to FOLDER/checks, as one JSON line, as soon as it is known. It writes what it is about to try
to FOLDER/stage. Both therefore survive a crash. This file is run as a script, so it imports nothing of this package:
its probes also work where the package cannot be imported.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SYSTEM_COMPILER = "export CXX=/usr/bin/g++ CC=/usr/bin/gcc"
# It uses streams and strings, so it is linked with the compiler's C++ standard library.
LIBRARY_SOURCE = """
#include <iostream>
#include <string>
extern "C" int probe(const char* text) { std::string s(text); std::cout << s << std::endl; return int(s.size()); }
"""
PROGRAM_SOURCE = """
#include <iostream>
#include <string>
int main() { std::string s("hello"); std::cout << s << std::endl; }
"""


class Report:
    """The folder in which one probe writes its checks, and what it is about to try."""

    def __init__(self, folder: Path, title: str) -> None:
        self.folder = folder
        self.title = title

    def stage(self, doing: str) -> None:
        """Write what is tried next; the doctor reads it if this process crashes or hangs."""
        (self.folder / "stage").write_text(doing, encoding="utf-8")

    def add(self, ok: bool | None, found: str, advice: str = "", name: str = "") -> None:
        """Append a check; its name is the probe's title by default."""
        line = json.dumps({"name": name or self.title, "ok": ok, "found": found, "advice": advice})
        with (self.folder / "checks").open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def package(report: Report, name: str, minimum: str) -> None:
    """Import a package, and compare its version with the minimum; an empty minimum accepts every version."""
    report.stage(f"importing {name}")
    importlib.import_module(name)
    version = importlib.metadata.version(name)
    ok = not minimum or _release(version) >= _release(minimum)
    report.add(ok, version if ok else f"{version}; {minimum} or newer is needed")


def torch_build(report: Report, minimum: str) -> None:
    """Import torch; report its version and build, its C++ ABI, and the CPU instructions that it uses."""
    report.stage("importing torch")
    import torch

    version = str(torch.__version__)
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    ok = _release(version) >= _release(minimum)
    report.add(ok, f"{version}, {build}" if ok else f"{version}; {minimum} or newer is needed")
    new_abi = torch.compiled_with_cxx11_abi()
    report.add(
        new_abi,
        "C++11" if new_abi else "before C++11",
        "The C++ library is built for the C++11 ABI: use an official torch build",
        name="torch's C++ ABI",
    )
    report.add(True, f"{torch.backends.cpu.get_cpu_capability()}, {platform.machine()}", name="CPU instructions")


def compiler(report: Report) -> None:
    """Build and run a C++20 program with the compiler that Inductor takes, and look at how it links a library."""
    chosen = os.environ.get("CXX", "")
    origin = f"CXX={chosen}" if chosen else "CXX not set"
    report.stage("asking torch for its compiler")
    try:
        path = _inductor_compiler()
    except Exception as error:
        report.add(False, f"none that works ({origin}): {_summary(error)}", _compiler_advice())
        return
    source, program = report.folder / "probe.cpp", report.folder / "probe"
    report.stage(f"running {path}")
    version = _output([path, "--version"]).splitlines()[:1]
    source.write_text(PROGRAM_SOURCE, encoding="utf-8")
    try:
        _output([path, "-std=c++20", str(source), "-o", str(program)])
        printed = _output([str(program)]).strip()
    except (OSError, subprocess.SubprocessError) as error:
        report.add(False, f"{path} ({origin}) does not build a C++20 program: {_summary(error)}", _compiler_advice())
        return
    report.add(printed == "hello", f"{shutil.which(path) or path} ({origin}): {''.join(version)}", _compiler_advice())
    if sys.platform == "linux":
        _check_standard_library(report, path)


def _check_standard_library(report: Report, compiler_path: str) -> None:
    """A library with a C++ standard library of its own crashes beside torch's, so it has to use the shared one."""
    source, library = report.folder / "library.cpp", report.folder / "probe.so"
    source.write_text(LIBRARY_SOURCE, encoding="utf-8")
    _output([compiler_path, "-std=c++20", "-shared", "-fPIC", str(source), "-o", str(library)])
    # The dynamic string table holds the names of the libraries that this one needs, so readelf is not needed.
    shared = b"libstdc++.so.6" in library.read_bytes()
    own = "output does not use the shared libstdc++.so.6 that torch uses"
    report.add(
        shared,
        "libstdc++.so.6, shared with torch" if shared else own,
        f"Such programs crash or fail when AOTInductor loads them. {_compiler_advice()}",
        name="C++ standard library",
    )


def aoti(report: Report, device: str) -> None:
    """Export, compile, load and run a small program with AOTInductor, and compare it with eager mode."""
    report.stage("importing torch")
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        report.add(None, "no CUDA device")
        return

    class Product(torch.nn.Module):
        def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return torch.relu(x @ weight) + x.sum(-1, keepdim=True)

    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).to(device) for shape in ((3, 64), (64, 64)))
    report.stage("exporting")
    rows = torch.export.Dim("rows", min=1, max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(Product(), (x, weight), dynamic_shapes=({0: rows}, None), strict=False)
    report.stage("compiling")
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(report.folder / "probe.pt2"))
    report.stage("loading the compiled program")
    compiled = torch._inductor.aoti_load_package(path)
    report.stage("running the compiled program")
    wider = torch.cat([x, x])
    error = (compiled(wider, weight) - Product()(wider, weight)).abs().max().item()
    report.add(error < 1e-3, f"exported, compiled, loaded, run; {error:.1e} from eager")


def cuda(report: Report) -> None:
    """Report nvcc; multiply matrices on every CUDA device, and compare with float64 on the CPU."""
    nvcc = "not found (optional)"
    with contextlib.suppress(OSError, subprocess.SubprocessError, StopIteration):
        nvcc = next(line for line in _output(["nvcc", "--version"]).splitlines() if "release" in line)
    report.add(None if "optional" in nvcc else True, nvcc, name="nvcc")
    report.stage("importing torch")
    import torch

    report.stage("looking for devices")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    if not torch.cuda.is_available():
        _explain_missing_cuda(report, torch, hidden)
        return
    for index in range(torch.cuda.device_count()):
        report.stage(f"multiplying on device {index}")
        found = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        left, right = torch.randn(2, 1024, 1024, generator=torch.Generator().manual_seed(0))
        product = (left.to(f"cuda:{index}") @ right.to(f"cuda:{index}")).cpu().double()
        exact = left.double() @ right.double()
        error = ((product - exact).abs().max() / exact.abs().max()).item()
        report.add(
            error < 1e-3,
            f"{found.name}, sm_{found.major}{found.minor}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free, "
            f"driver {_driver()}; matmul {error:.1e} from exact",
            name=f"CUDA device {index}",
        )


def _explain_missing_cuda(report: Report, torch: Any, hidden: bool) -> None:
    """Say why torch sees no device: none is there, they are hidden, or the driver or the build is wrong."""
    if hidden or not _has_nvidia_driver():
        report.add(None, "hidden by CUDA_VISIBLE_DEVICES" if hidden else "no NVIDIA device")
    elif torch.version.cuda is None:
        report.add(None, f"driver {_driver()}, but torch is a CPU build", "For the GPU, install a CUDA build of torch")
    else:
        try:
            torch.cuda.init()
            reason = "no device visible"
        except Exception as error:
            reason = _summary(error)
        report.add(False, f"driver {_driver()}, torch for CUDA {torch.version.cuda}, but: {reason}")


# --------------------------------------------------------------------------------------------------------- helpers


def _inductor_compiler() -> str:
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
    except ImportError:  # the probe `torch_build` reports it
        return os.environ.get("CXX", "g++")
    return str(get_cpp_compiler())


def _compiler_advice() -> str:
    if os.access("/usr/bin/g++", os.X_OK):
        return SYSTEM_COMPILER
    return f"Install g++ 11 or newer (Debian, Ubuntu: apt-get install g++), then {SYSTEM_COMPILER}"


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=100).stdout


def _has_nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()


def _driver() -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).split("\n")[0].strip()
    return "of unknown version"


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _summary(error: BaseException) -> str:
    """The exception's type and one line of its text: a compiler's first error if there is one, else the first line."""
    text = f"{getattr(error, 'stderr', None) or ''}\n{error}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = next((line for line in lines if re.search(r"(error|undefined reference|No such file).*\S", line)), None)
    return f"{type(error).__name__}: {telling or ''.join(lines[:1])}"[:300]


def main(probes: Sequence[Callable[..., None]], folder: str, title: str, function: str, *arguments: str) -> None:
    """Run one of the probes; an exception that it raises becomes a check that fails."""
    report = Report(Path(folder), title)
    try:
        {probe.__name__: probe for probe in probes}[function](report, *arguments)
    except Exception as error:
        stage = report.folder / "stage"
        doing = f" (while {stage.read_text(encoding='utf-8')})" if stage.exists() else ""
        report.add(False, f"{_summary(error)}{doing}")


if __name__ == "__main__":
    main((package, torch_build, compiler, aoti, cuda), *sys.argv[1:])
