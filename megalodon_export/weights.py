"""Weights of a bundle: read once, bound by name to every program.

`model.safetensors` holds the checkpoint. `constants.safetensors` holds what depends on the weights alone (EMA
coefficients, rotary tables). On a CPU both are mapped, not read: processes that open the same bundle share the pages.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .checkpoints import WEIGHTS
from .exporters.programs import dtype_name
from .model import MegalodonForCausalLM

CONSTANTS = "constants.safetensors"
_PROGRAM_PREFIX = "model."  # programs hold the model as their submodule `model`


def save_constants(model: MegalodonForCausalLM, folder: Path) -> None:
    """Write the derived constants of a frozen model."""
    buffers = {name: tensor.cpu() for name, tensor in model.named_buffers() if ".frozen." in f".{name}"}
    save_file(buffers, folder / CONSTANTS)


def constant_sources(names: Iterable[str], folder: Path) -> dict[str, dict[str, Any]]:
    """For each constant of a program, where its tensor is: file, name in it, dtype, shape. KeyError if nowhere."""
    stored = {file: _headers(folder / file) for file in (WEIGHTS, CONSTANTS)}
    tied = dict(MegalodonForCausalLM._tied_weights_keys)
    tied |= {source: name for name, source in tied.items()}  # a file holds one of the two names
    sources = {}
    for name in sorted(names):
        tensor = name.removeprefix(_PROGRAM_PREFIX)
        found = [(file, alias) for alias in (tensor, tied.get(tensor)) for file in stored if alias in stored[file]]
        if not found:
            raise KeyError(f"the program's constant {name} is in neither {WEIGHTS} nor {CONSTANTS}")
        file, tensor = found[0]
        dtype, shape = stored[file][tensor]
        sources[name] = {"file": file, "tensor": tensor, "dtype": dtype, "shape": shape}
    return sources


class WeightStore:
    """The tensors of a bundle on one device, each loaded at most once."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._device = device
        self._files = {
            file: safe_open(folder / file, framework="pt", device="cpu")  # mapped, then moved if need be
            for file in (WEIGHTS, CONSTANTS)
        }
        self._tensors: dict[tuple[str, str], Tensor] = {}

    def bind(self, sources: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
        """The tensor for every constant of a program; ValueError if one is not as the manifest says."""
        bound = {}
        for name, source in sources.items():
            key = source["file"], source["tensor"]
            if key not in self._tensors:
                self._tensors[key] = self._files[source["file"]].get_tensor(source["tensor"]).to(self._device)
            tensor = self._tensors[key]
            found = dtype_name(tensor.dtype), list(tensor.shape)
            if found != (source["dtype"], source["shape"]):
                raise ValueError(
                    f"{source['file']}: {source['tensor']} is {found[0]} {found[1]}, but the manifest says "
                    f"{source['dtype']} {source['shape']}; export the bundle again"
                )
            bound[name] = tensor
        return bound


def _headers(path: Path) -> dict[str, tuple[str, list[int]]]:
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        return {name: (dtype_name(file.get_tensor(name).dtype), file.get_slice(name).get_shape()) for name in names}
