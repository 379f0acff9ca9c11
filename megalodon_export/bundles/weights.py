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
from ..exporters.programs import ProgramName
from ..exporters.weight_files import WeightFiles
from ..model.modeling import MegalodonLM
from .manifest import CONSTANTS, WEIGHTS


def save_constants(model: MegalodonLM, folder: Path) -> None:
    """Write the derived constants of a frozen model."""
    buffers = {name: tensor.cpu() for name, tensor in model.named_buffers() if ".frozen." in f".{name}"}
    save_file(buffers, folder / CONSTANTS)


def with_sources(
    stages: dict[ProgramName, CompiledProgram], layers: int, folder: Path
) -> dict[ProgramName, CompiledProgram]:
    """A copy of the programs, whose weights say where they are: `file`, and `tensor` in it.

    KeyError if a weight is nowhere, ValueError if it is not what the stage was compiled for, in any layer.
    """
    files = WeightFiles(folder, (WEIGHTS, CONSTANTS))

    def found(one: StageInput) -> StageInput:
        if one.kind != "weight":
            return one
        first = files.find(numbered(one.name, 0))
        tensor = one.name if first.name == numbered(one.name, 0) else first.name  # tied weights are of no layer
        for stored in (files.find(numbered(tensor, layer)) for layer in range(layers)):
            _require(one, stored.dtype, stored.shape, stored.file, stored.name)
        return replace(one, file=first.file, tensor=tensor)

    def complete(stage: CompiledStage) -> CompiledStage:
        return replace(stage, inputs=tuple(found(one) for one in stage.inputs))

    return {name: CompiledProgram(*map(complete, program.stages)) for name, program in stages.items()}


def _require(one: StageInput, dtype: str, shape: tuple[int, ...], file: str, name: str) -> None:
    if (dtype, shape) != (one.dtype, one.shape):
        raise ValueError(
            f"{file}: {name} is {dtype} {list(shape)}, but the manifest says {one.dtype} {list(one.shape or ())}; "
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
        """The tensors of a layer for the weights among a stage's inputs, by the input's name."""
        return {one.name: self._tensor(one, layer) for one in inputs if one.kind == "weight"}

    def _tensor(self, one: StageInput, layer: int) -> Tensor:
        assert one.file is not None
        assert one.tensor is not None
        key = one.file, numbered(one.tensor, layer)
        if key not in self._tensors:
            self._tensors[key] = self._files[one.file].get_tensor(key[1]).to(self._device)
        return self._tensors[key]
