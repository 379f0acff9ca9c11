"""Check by trying whether this machine can export and run a bundle, and say what to change.

Every probe of `probes.py` runs in a process of its own, with its own cache of compiled code: a crash in native
code is a finding, not the doctor's end, and nothing compiled earlier hides a broken compiler. This module needs the
standard library only.
"""

from __future__ import annotations

import dataclasses
import json as jsonlib
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ..exporters.workers import end_process, start_process

MIN_PYTHON = (3, 11)
MIN_MEMORY_GIB = 2.0
MIN_DISK_GIB = 1.0
GIB = 2**30

_SCRIPT = Path(__file__).with_name("probes.py")
_INSTALL = "Install it: python -m pip install --upgrade"
_COMPILER = (
    "Install the system's compiler (Debian, Ubuntu: apt-get install g++); export CXX=/usr/bin/g++ CC=/usr/bin/gcc"
)
_AOTI = f"See the rows about torch and the C++ compiler. {_COMPILER}"


@dataclasses.dataclass(frozen=True)
class Check:
    """One row: ok is True, False (something required is missing or broken) or None (optional and not there)."""

    name: str
    ok: bool | None
    found: str
    advice: str = ""


@dataclasses.dataclass(frozen=True)
class Probe:
    """One process: a function of the script, its arguments, seconds it may take, and what to do if it fails."""

    title: str
    function: str
    arguments: tuple[str, ...] = ()
    timeout: float = 60.0
    advice: str = ""
    script: Path = _SCRIPT


def _package(name: str, minimum: str = "") -> Probe:
    return Probe(name, "package", (name, minimum), 120.0, f"{_INSTALL} {name}")


PROBES: tuple[Probe, ...] = (
    Probe("torch", "torch_build", ("2.11",), 120.0, f'{_INSTALL} "torch>=2.11"'),
    _package("transformers", "5"),
    _package("onnx"),
    _package("onnx_ir", "1.0"),
    _package("safetensors"),
    _package("tokenizers"),
    Probe("C++ compiler", "compiler", (), 120.0, _COMPILER),
    Probe("AOTInductor on the CPU", "aoti", ("cpu",), 300.0, _AOTI),
    Probe("CUDA", "cuda", (), 120.0, "Check the driver with nvidia-smi; install a torch build for its CUDA version"),
    Probe("AOTInductor on CUDA", "aoti", ("cuda",), 300.0, _AOTI),
    Probe("ONNX Runtime on the CPU", "onnx_runtime", ("cpu",), 60.0, f"{_INSTALL} onnxruntime-gpu"),
    Probe(
        "ONNX Runtime on CUDA",
        "onnx_runtime",
        ("cuda",),
        120.0,
        "Install onnxruntime-gpu without onnxruntime beside it, and the CUDA and cuDNN versions it was built for",
    ),
)


def diagnose(probes: Sequence[Probe] = PROBES) -> list[Check]:
    """Run the probes, as many at a time as there are cores, and return their checks in order; progress on stderr.

    About half a minute on two cores; most of it is AOTInductor finding the CPU's vector instructions.
    """
    return [*_machine(), *_run(probes)]


def main(json: bool) -> int:
    """Print the diagnosis on stdout, as a table or as one JSON object; 0 if everything required works, else 1."""
    checks = diagnose()
    failed = [check.name for check in checks if check.ok is False]
    if json:
        print(jsonlib.dumps({"ok": not failed, "checks": [dataclasses.asdict(check) for check in checks]}, indent=2))
    else:
        print(table(checks))
        print(f"\nNot working: {', '.join(failed)}." if failed else "\nEverything that is required works.")
    return 1 if failed else 0


def table(checks: Sequence[Check]) -> str:
    """Rows of state, name and finding, aligned, with advice on a line of its own."""
    width = max((len(check.name) for check in checks), default=0)
    states = {True: "ok", False: "FAIL", None: "-"}
    lines = []
    for check in checks:
        lines.append(f"{states[check.ok]:<4}  {check.name:<{width}}  {check.found}".rstrip())
        if check.advice and check.ok is not True:
            lines.append(f"{'':<4}  {'':<{width}}  -> {check.advice}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------ processes


class _Job:
    """A running probe and the folder in which it reports."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.folder = tempfile.TemporaryDirectory(prefix="megalodon-doctor-", ignore_cleanup_errors=True)
        self.path = Path(self.folder.name)
        self.started = time.monotonic()
        # -P: the script's own folder must not shadow other packages with this package's module names.
        command = [sys.executable, "-P", str(probe.script), str(self.path), probe.title, probe.function]
        caches = {"TORCHINDUCTOR_CACHE_DIR": str(self.path / "inductor"), "TRITON_CACHE_DIR": str(self.path / "triton")}
        self.process = start_process([*command, *probe.arguments], self.path / "output", {**os.environ, **caches})

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def checks(self, timed_out: bool) -> list[Check]:
        found = self.path / "checks"
        lines = found.read_text(encoding="utf-8").splitlines() if found.exists() else []
        checks = [Check(**jsonlib.loads(line)) for line in lines]
        if failure := self._failure(timed_out):
            checks.append(Check(self.probe.title, False, failure))
        return [
            dataclasses.replace(check, advice=self.probe.advice) if check.ok is False and not check.advice else check
            for check in checks
        ]

    def _failure(self, timed_out: bool) -> str:
        stage = self.path / "stage"
        doing = f" while {stage.read_text(encoding='utf-8')}" if stage.exists() else ""
        status = self.process.returncode
        if timed_out:
            return f"not done after {self.probe.timeout:.0f} s{doing}"
        if status < 0:
            return f"killed by {signal.Signals(-status).name}{doing}"
        if status > 0:
            output = (self.path / "output").read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((line for line in reversed(output) if line.strip()), "no output")
            return f"exit status {status}{doing}: {last.strip()[:200]}"
        return ""


def _run(probes: Sequence[Probe]) -> list[Check]:
    waiting = sorted(range(len(probes)), key=lambda index: -probes[index].timeout)  # the long ones first
    running: dict[int, _Job] = {}
    results: dict[int, list[Check]] = {}
    _progress(f"doctor: {len(probes)} probes, about a minute in all")
    try:
        while waiting or running:
            while waiting and len(running) < min(4, _cores()):
                index = waiting.pop(0)
                running[index] = _Job(probes[index])
            for index, job in list(running.items()):
                timed_out = job.process.poll() is None and job.seconds() > job.probe.timeout
                if timed_out:
                    end_process(job.process)
                if job.process.returncode is None:
                    continue
                results[index] = job.checks(timed_out)
                job.folder.cleanup()
                del running[index]
                _progress(f"doctor: {len(results)}/{len(probes)} {job.probe.title}, {job.seconds():.1f} s")
            time.sleep(0.02)
    finally:
        for job in running.values():
            end_process(job.process)
            job.folder.cleanup()
    return [check for index in range(len(probes)) for check in results[index]]


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------------------------- machine


def _machine() -> list[Check]:
    wanted = ".".join(map(str, MIN_PYTHON))
    memory, disk = _available_memory() / GIB, shutil.disk_usage(tempfile.gettempdir()).free / GIB
    return [
        Check(
            "Python",
            sys.version_info >= MIN_PYTHON,
            f"{platform.python_version()}, {platform.system()} {platform.machine()}",
            f"Python {wanted} or newer is needed",
        ),
        Check("CPU cores", True, str(_cores())),
        Check(
            "free memory",
            memory >= MIN_MEMORY_GIB,
            f"{memory:.1f} GiB",
            f"Compiling needs about {MIN_MEMORY_GIB:.0f} GiB beside the weights; end other programs or raise the limit",
        ),
        Check(
            "free disk",
            disk >= MIN_DISK_GIB,
            f"{disk:.1f} GiB in {tempfile.gettempdir()}",
            f"Compiling needs about {MIN_DISK_GIB:.0f} GiB; free some, or set TMPDIR to a larger disk",
        ),
    ]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _available_memory() -> float:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = float(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")  # what a container is limited to
    if (group / "memory.max").exists() and (limit := (group / "memory.max").read_text().strip()) != "max":
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = float((group / "memory.current").read_text()) - float(stat["inactive_file"])  # given back when needed
        available = min(available, float(limit) - used)
    return available
