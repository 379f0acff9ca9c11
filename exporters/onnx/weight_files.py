"""Weights of ONNX graphs: places in the bundle's safetensors files, to which the graphs refer.

An initializer with external data is a file, an offset and a length:

    ExternalWeights(folder, ("model.safetensors",)).external("lm_head.weight")
    -> ExternalTensor(location="model.safetensors", offset=4096, length=32896)

Large constants that follow from weights are written to one more such file, CONSTANTS.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from safetensors.torch import save_file
from torch import Tensor

from ..onnx_names import CONSTANTS
from ..weight_files import WeightFiles

_SMALL = 1 << 16  # bytes; larger constants are in the file of that name


class ExternalWeights(WeightFiles):
    """The tensors of a bundle's safetensors files, as values and as places that graphs refer to."""

    def external(self, name: str) -> ir.ExternalTensor:
        """A weight as ONNX refers to it."""
        stored = self.find(name)
        return ir.ExternalTensor(
            stored.file,
            stored.start,
            stored.end - stored.start,
            from_torch_dtype(getattr(torch, stored.dtype)),
            shape=ir.Shape(stored.shape),
            name=name,
            base_dir=self.folder,
        )


def move_large_constants(graphs: list[ir.Graph], folder: Path) -> None:
    """Write the large constants of graphs to one file, equal ones once, and let the graphs refer to it."""
    places: dict[str, list[ir.Value]] = {}
    tensors: dict[str, Tensor] = {}
    for value in (value for graph in graphs for value in graph.initializers.values()):
        constant = value.const_value
        if isinstance(constant, TorchTensor) and constant.nbytes > _SMALL:
            name = hashlib.sha256(constant.tobytes() + str(constant.shape).encode()).hexdigest()[:16]
            tensors[name] = constant.raw
            places.setdefault(name, []).append(value)
    save_file(tensors, folder / CONSTANTS)
    stored = ExternalWeights(folder, (CONSTANTS,))
    for name, value in ((name, value) for name, values in places.items() for value in values):
        value.const_value = stored.external(name)
