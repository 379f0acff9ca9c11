"""Weights of ONNX graphs: places in the bundle's safetensors files, to which the graphs refer.

An initializer with external data is a file, an offset and a length:

    WeightFiles(folder, ("model.safetensors",)).external("lm_head.weight")
    -> ExternalTensor(location="model.safetensors", offset=4096, length=32896)

Large constants that follow from weights are written to one more such file, CONSTANTS.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...model import MegalodonForCausalLM

CONSTANTS = "onnx_constants.safetensors"
_SMALL = 1 << 16  # bytes; larger constants are in the file of that name
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}


class WeightFiles:
    """The tensors of a bundle's safetensors files, as values and as places in the files."""

    def __init__(self, folder: Path, files: tuple[str, ...]) -> None:
        self._opened = {file: safe_open(folder / file, framework="pt") for file in files}
        self._entries = {name: (file, e) for file in files for name, e in _read_header(folder / file).items()}
        self._folder = folder
        tied = dict(MegalodonForCausalLM._tied_weights_keys)
        self._alias = tied | {source: name for name, source in tied.items()}  # a file holds one of the two

    def tensor(self, name: str) -> Tensor:
        """A weight's value, mapped from the file."""
        name = self._stored(name)
        return self._opened[self._entries[name][0]].get_tensor(name)

    def external(self, name: str) -> ir.ExternalTensor:
        """A weight as ONNX refers to it."""
        file, (dtype, shape, start, end) = self._entries[self._stored(name)]
        kind = from_torch_dtype(getattr(torch, _DTYPES[dtype]))
        return ir.ExternalTensor(
            file, start, end - start, kind, shape=ir.Shape(shape), name=name, base_dir=self._folder
        )

    def _stored(self, name: str) -> str:
        found = name if name in self._entries else self._alias.get(name)
        if found not in self._entries:
            raise KeyError(f"the program's input {name} is in none of the bundle's files {', '.join(self._opened)}")
        return found  # type: ignore[return-value]


def _read_header(path: Path) -> dict[str, tuple[str, list[int], int, int]]:
    """dtype, shape, first and last byte of every tensor of a safetensors file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    start = 8 + size
    return {n: (e["dtype"], e["shape"], *(start + at for at in e["data_offsets"])) for n, e in header.items()}


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
    stored = WeightFiles(folder, (CONSTANTS,))
    for name, value in ((name, value) for name, values in places.items() for value in values):
        value.const_value = stored.external(name)
