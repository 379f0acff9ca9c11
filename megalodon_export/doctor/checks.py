"""Try whether this machine can export and run a bundle, and say what to change.

`PROBES` lists what is tried; the functions behind it are in `probes.py` and `onnx_probe.py`. This module needs the
standard library only.
"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..exporters.scratch import temporary_folder
from .machine import machine_checks
from .report import Check, table
from .run_probes import Probe, run_probes

_INSTALL = "Install it: python -m pip install --upgrade"
_COMPILER = (
    "Install the system's compiler (Debian, Ubuntu: apt-get install g++); export CXX=/usr/bin/g++ CC=/usr/bin/gcc"
)
_AOTI = f"See the rows about torch and the C++ compiler. {_COMPILER}"
_ONNX = Path(__file__).with_name("onnx_probe.py")


def _package(name: str, minimum: str = "") -> Probe:
    return Probe(name, "package", (name, minimum), 120.0, f"{_INSTALL} {name}")


PROBES: tuple[Probe, ...] = (
    Probe("torch", "torch_build", ("2.11",), 120.0, f'{_INSTALL} "torch>=2.11"'),
    _package("transformers", "5.16"),
    _package("msgspec", "0.19"),
    _package("onnx_ir", "1.0"),
    _package("safetensors", "0.8"),
    _package("tokenizers", "0.23"),
    Probe("C++ compiler", "compiler", (), 120.0, _COMPILER),
    Probe("AOTInductor on the CPU", "aoti", ("cpu",), 300.0, _AOTI),
    Probe("CUDA", "cuda", (), 120.0, "Check the driver with nvidia-smi; install a torch build for its CUDA version"),
    Probe("AOTInductor on CUDA", "aoti", ("cuda",), 300.0, _AOTI),
    Probe("ONNX Runtime on the CPU", "onnx_graphs", ("cpu",), 300.0, f'{_INSTALL} "onnxruntime-gpu>=1.26"', _ONNX),
    Probe(
        "ONNX Runtime on CUDA",
        "onnx_graphs",
        ("cuda",),
        300.0,
        "Install onnxruntime-gpu without onnxruntime beside it, and the CUDA and cuDNN versions it was built for",
        _ONNX,
    ),
)


def diagnose(probes: Sequence[Probe] = PROBES) -> list[Check]:
    """Look at the machine, run the probes, and return all checks in order. Progress goes to stderr.

    Without a temporary folder there is none to run probes in, and the checks of the machine are all.
    The probes take about half a minute on two cores. Most of it is AOTInductor finding the CPU's vector instructions.
    """
    machine = machine_checks()
    return machine if temporary_folder() is None else [*machine, *run_probes(probes)]


def main(json: bool) -> int:
    """Print the diagnosis on stdout, as a table or as one JSON object; 0 if everything required works, else 1."""
    checks = diagnose()
    failed = [check.name for check in checks if check.ok is False]
    if json:
        print(jsonlib.dumps({"ok": not failed, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        print(table(checks))
        print(f"\nNot working: {', '.join(failed)}." if failed else "\nEverything that is required works.")
    return 1 if failed else 0
