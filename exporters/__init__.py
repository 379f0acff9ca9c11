"""How a model becomes an artifact. Exporters are imported on first use; `exporter("aoti")` finds one by name."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

EXPORTERS = {"aoti": ".aoti", "onnx": ".onnx.build_graphs", "onnx_kernels": ".onnx_kernels.build"}


def exporter(name: str) -> ModuleType:
    """The module of an exporter; KeyError names those there are."""
    if name not in EXPORTERS:
        raise KeyError(f"no exporter {name!r}; there are {', '.join(EXPORTERS)}")
    return import_module(EXPORTERS[name], __package__)
