"""Weights of a bundle: read once, passed to every stage of the programs by name.

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

from ..exporters.programs import LAYER_INDEX, dtype_name
from ..model import MegalodonForCausalLM
from .checkpoints import WEIGHTS

CONSTANTS = "constants.safetensors"


def save_constants(model: MegalodonForCausalLM, folder: Path) -> None:
    """Write the derived constants of a frozen model."""
    buffers = {name: tensor.cpu() for name, tensor in model.named_buffers() if ".frozen." in f".{name}"}
    save_file(buffers, folder / CONSTANTS)


def add_sources(programs: dict[str, dict[str, Any]], layers: int, folder: Path) -> None:
    """Say, for each weight among the inputs of a manifest's stages, where it is: `file`, and `tensor` in it.

    KeyError if it is nowhere, ValueError if it is not what the stage was compiled for, in any layer.
    """
    stored = {file: _headers(folder / file) for file in (WEIGHTS, CONSTANTS)}
    tied = dict(MegalodonForCausalLM._tied_weights_keys)
    tied |= {source: name for name, source in tied.items()}  # a file holds one of the two names
    for stage in (stage for program in programs.values() for stage in program.values()):
        for one in (one for one in stage["inputs"] if one["kind"] == "weight"):
            names = [alias for alias in (one["name"], tied.get(one["name"])) if alias is not None]
            found = [(file, name) for name in names for file in stored if numbered(name, 0) in stored[file]]
            if not found:
                raise KeyError(f"the program's input {one['name']} is in neither {WEIGHTS} nor {CONSTANTS}")
            one["file"], one["tensor"] = found[0]
            for layer in range(layers):
                name = numbered(one["tensor"], layer)
                _require(one, stored[one["file"]][name], name)


def numbered(name: str, layer: int) -> str:
    """The name of a tensor of a layer, from that for all layers."""
    return name.replace(LAYER_INDEX, str(layer))


def _require(one: dict[str, Any], found: tuple[str, list[int]], name: str) -> None:
    if found != (one["dtype"], one["shape"]):
        raise ValueError(
            f"{one['file']}: {name} is {found[0]} {found[1]}, but the manifest says {one['dtype']} {one['shape']}; "
            "export the bundle again"
        )


class WeightStore:
    """The tensors of a bundle on one device, each loaded at most once."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._device = device
        self._files = {
            file: safe_open(folder / file, framework="pt", device="cpu")  # mapped, then moved if need be
            for file in (WEIGHTS, CONSTANTS)
        }
        self._tensors: dict[tuple[str, str], Tensor] = {}

    def bind(self, inputs: Iterable[dict[str, Any]], layer: int = 0) -> dict[str, Tensor]:
        """The tensors of a layer for the weights among a stage's inputs, by the input's name.

        ValueError if one is not as the manifest says.
        """
        return {one["name"]: self._tensor(one, layer) for one in inputs if one["kind"] == "weight"}

    def _tensor(self, one: dict[str, Any], layer: int) -> Tensor:
        key = one["file"], numbered(one["tensor"], layer)
        if key not in self._tensors:
            self._tensors[key] = self._files[one["file"]].get_tensor(key[1]).to(self._device)
        tensor = self._tensors[key]
        _require(one, (dtype_name(tensor.dtype), list(tensor.shape)), key[1])
        return tensor


def _headers(path: Path) -> dict[str, tuple[str, list[int]]]:
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        return {name: (dtype_name(file.get_tensor(name).dtype), file.get_slice(name).get_shape()) for name in names}
