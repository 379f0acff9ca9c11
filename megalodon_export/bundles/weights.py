"""Weights of a bundle: read once, passed to every stage of the programs by name.

`model.safetensors` holds the checkpoint. `constants.safetensors` holds what depends on the weights alone (EMA
coefficients, rotary tables). On a CPU both are mapped, not read: processes that open the same bundle share the pages.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from msgspec.structs import replace
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..exporters.manifest_types import CompiledProgram, CompiledStage, StageInput, numbered
from ..exporters.programs import ProgramName, dtype_name
from ..model import MegalodonForCausalLM
from .manifest import CONSTANTS, WEIGHTS


def save_constants(model: MegalodonForCausalLM, folder: Path) -> None:
    """Write the derived constants of a frozen model."""
    buffers = {name: tensor.cpu() for name, tensor in model.named_buffers() if ".frozen." in f".{name}"}
    save_file(buffers, folder / CONSTANTS)


def with_sources(
    stages: dict[ProgramName, CompiledProgram], layers: int, folder: Path
) -> dict[ProgramName, CompiledProgram]:
    """The same programs, whose weights say where they are: `file`, and `tensor` in it.

    KeyError if a weight is nowhere, ValueError if it is not what the stage was compiled for, in any layer.
    """
    stored = {file: _headers(folder / file) for file in (WEIGHTS, CONSTANTS)}
    tied = dict(MegalodonForCausalLM._tied_weights_keys)
    tied |= {source: name for name, source in tied.items()}  # a file holds one of the two names

    def found(one: StageInput) -> StageInput:
        if one.kind != "weight":
            return one
        names = [alias for alias in (one.name, tied.get(one.name)) if alias is not None]
        places = [(file, name) for name in names for file in stored if numbered(name, 0) in stored[file]]
        if not places:
            raise KeyError(f"the program's input {one.name} is in neither {WEIGHTS} nor {CONSTANTS}")
        file, tensor = places[0]
        for name in (numbered(tensor, layer) for layer in range(layers)):
            _require(one, stored[file][name], file, name)
        return replace(one, file=file, tensor=tensor)

    def complete(stage: CompiledStage) -> CompiledStage:
        return replace(stage, inputs=tuple(found(one) for one in stage.inputs))

    return {name: CompiledProgram(*map(complete, program.stages)) for name, program in stages.items()}


def _require(one: StageInput, found: tuple[str, list[int]], file: str, name: str) -> None:
    expected = one.dtype, list(one.shape or ())
    if found != expected:
        raise ValueError(
            f"{file}: {name} is {found[0]} {found[1]}, but the manifest says {expected[0]} {expected[1]}; "
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

    def bind(self, inputs: Iterable[StageInput], layer: int = 0) -> dict[str, Tensor]:
        """The tensors of a layer for the weights among a stage's inputs, by the input's name.

        ValueError if one is not as the manifest says.
        """
        return {one.name: self._tensor(one, layer) for one in inputs if one.kind == "weight"}

    def _tensor(self, one: StageInput, layer: int) -> Tensor:
        assert one.file is not None
        assert one.tensor is not None
        key = one.file, numbered(one.tensor, layer)
        if key not in self._tensors:
            self._tensors[key] = self._files[one.file].get_tensor(key[1]).to(self._device)
        tensor = self._tensors[key]
        _require(one, (dtype_name(tensor.dtype), list(tensor.shape)), *key)
        return tensor


def _headers(path: Path) -> dict[str, tuple[str, list[int]]]:
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        return {name: (dtype_name(file.get_tensor(name).dtype), file.get_slice(name).get_shape()) for name in names}
