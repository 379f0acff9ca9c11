"""Where programs run: one interface for eager, AOTInductor and ONNX Runtime, imported on first use.

A runtime holds the weights and is shared by any number of sessions. The state of streams is a cache, which
`Runtime.bind` makes programs for. To add a runtime, subclass `Runtime` and `BoundPrograms`, and name it in RUNTIMES.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from ..bundles.manifest import Manifest
from ..generation.arguments import device as device_name
from ..generation.arguments import show
from .ambient import ForkedProcess, PlainModes, in_plain_modes, opening_process
from .base import Runtime, RuntimeUnavailable
from .bound_programs import BoundPrograms

__all__ = [
    "RUNTIMES",
    "BoundPrograms",
    "ForkedProcess",
    "PlainModes",
    "Runtime",
    "RuntimeUnavailable",
    "check_runtime",
    "default_runtime",
    "in_plain_modes",
    "open_runtime",
]

RUNTIMES = {"eager": ".eager:EagerRuntime", "aoti": ".aoti:AotiRuntime", "onnx": ".onnx:OnnxRuntime"}


def default_runtime(manifest: Manifest) -> str:
    """The runtime of the programs in a bundle: "onnx" if it has ONNX programs alone, else "aoti"."""
    return "onnx" if list(manifest.programs.by_runtime()) == ["onnx"] else "aoti"


def check_runtime(name: object) -> None:
    """ValueError unless there is a runtime of that name."""
    if not isinstance(name, str) or name not in RUNTIMES:
        raise ValueError(f"no runtime {show(name)}; there are {', '.join(RUNTIMES)}")


@in_plain_modes
def open_runtime(name: str, folder: Path, manifest: Manifest, device: str | None = None) -> Runtime:
    """Open a checked bundle in a runtime; ValueError for an unknown one, RuntimeUnavailable if it cannot run here.

    ForkedProcess in a child of a process that had opened a bundle.
    """
    opening_process()
    check_runtime(name)
    module, attribute = RUNTIMES[name].split(":")
    runtime: Runtime = getattr(import_module(module, __package__), attribute)(folder, manifest, device_name(device))
    return runtime
