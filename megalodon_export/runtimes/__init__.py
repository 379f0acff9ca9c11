"""Where programs run: one interface for eager, AOTInductor and ONNX Runtime, imported on first use.

A runtime holds the weights and is shared by any number of sessions; the state of a stream is a cache that its caller
owns. To add one: subclass `Runtime`, name it in RUNTIMES.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from ..bundles.manifest import Manifest
from .base import Runtime, RuntimeUnavailable

__all__ = ["RUNTIMES", "Runtime", "RuntimeUnavailable", "default_runtime", "open_runtime"]

RUNTIMES = {"eager": ".eager:EagerRuntime", "aoti": ".aoti:AotiRuntime", "onnx": ".onnx:OnnxRuntime"}


def default_runtime(manifest: Manifest) -> str:
    """The runtime of a bundle's own programs, AOTInductor's first; for one that has none, the one that says so."""
    return "onnx" if list(manifest.programs.by_runtime()) == ["onnx"] else "aoti"


def open_runtime(name: str, folder: Path, manifest: Manifest, device: str | None = None) -> Runtime:
    """Open a checked bundle in a runtime; ValueError for an unknown one, RuntimeUnavailable if it cannot run here."""
    if name not in RUNTIMES:
        raise ValueError(f"no runtime {name!r}; there are {', '.join(RUNTIMES)}")
    module, attribute = RUNTIMES[name].split(":")
    runtime: Runtime = getattr(import_module(module, __package__), attribute)(folder, manifest, device)
    return runtime
