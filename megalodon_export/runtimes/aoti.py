"""AOTInductor programs of a bundle, run stage by stage on one copy of the weights."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..bundles.manifest import Manifest
from ..bundles.weights import WeightStore
from ..exporters.manifest_types import CompiledProgram, CompiledStage, StageInput, Target, numbered
from ..exporters.programs import DECODE, DECODE_ONE, NEXT_TOKENS, PREFILL, ProgramName
from ..exporters.scratch import is_noexec
from ..exporters.target import cpu_features
from ..exporters.torch_internals import Program, load_library
from ..model import ModelCache
from ..model.modeling import last_valid
from .base import Runtime, RuntimeUnavailable, require_device
from .bound_programs import BoundPrograms


class AotiRuntime(Runtime):
    """Runs the libraries in `aoti`. The bundle's hashes must have been checked: this loads native code."""

    def __init__(self, folder: Path, manifest: Manifest, device: str | None = None) -> None:
        entry = manifest.programs.aoti
        if entry is None:
            raise RuntimeUnavailable(f"{folder} has no AOTInductor programs; make them: megalodon-export aoti")
        chosen = _check_target(entry.target, manifest.versions, device)
        config, dtype = manifest.config, manifest.torch_dtype
        super().__init__(config, dtype, chosen, entry.limits, entry.all_logits, manifest.model_id)
        self._load(folder / "aoti", entry.stages, WeightStore(folder, chosen).bind)

    def _load(
        self,
        folder: Path,
        programs: dict[ProgramName, CompiledProgram],
        weights: Callable[[tuple[StageInput, ...], int], dict[str, Tensor]],
    ) -> None:
        """Load the stages of all programs from a folder of libraries, once all weights are found.

        `weights` finds those among a stage's inputs, for a layer, by name.
        """
        layers = range(self.config.num_layers)
        stages = [stage for program in programs.values() for stage in program.stages]
        found = {stage.name: [weights(stage.inputs, layer) for layer in layers] for stage in stages}

        def load(stage: CompiledStage) -> _Stage:
            return _Stage(_load_library(folder / stage.library, self.device), stage, found[stage.name])

        self.programs = {name: tuple(map(load, program.stages)) for name, program in programs.items()}

    def _bind(self, cache: ModelCache, capture: bool) -> BoundPrograms:
        return BoundAotiPrograms(self, cache, capture)


class BoundAotiPrograms(BoundPrograms):
    """The compiled programs over one cache; a batch of 1 has a decode program of its own."""

    def __init__(self, runtime: AotiRuntime, cache: ModelCache, capture: bool) -> None:
        super().__init__(runtime, cache, capture)
        tensors, layers = runtime.named_tensors(cache), runtime.config.num_layers
        decode = DECODE_ONE if cache.batch == 1 and DECODE_ONE in runtime.programs else DECODE
        self._prefill = _BoundProgram(runtime.programs[PREFILL], tensors, layers)
        self._decode = _BoundProgram(runtime.programs[decode], tensors, layers)

    def run_prefill(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """Logits (B, V) of the last tokens."""
        logits = self._prefill(token_ids=token_ids, lengths=lengths)
        return last_valid(logits, lengths) if self.runtime.all_logits else logits

    def run_score(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """Logits (B, L, V) of all tokens."""
        return self._prefill(token_ids=token_ids, lengths=lengths)

    def run_decode(self, token_ids: Tensor) -> Tensor:
        """Logits (B, V)."""
        next_tokens = torch.empty(2, self.cache.batch, dtype=torch.int64, device=self.runtime.device)
        return self._decode(token_ids=token_ids, next_tokens=next_tokens)

    def run_greedy(self, token_ids: Tensor, next_tokens: Tensor) -> None:
        """On a GPU the program itself writes `next_tokens`."""
        if not self._decode.writes_next_tokens:
            return super().run_greedy(token_ids, next_tokens)
        self._decode(token_ids=token_ids, next_tokens=next_tokens)


class _Stage:
    """A compiled stage, and its weights by layer and name."""

    def __init__(self, run: Program, entry: CompiledStage, weights: list[dict[str, Tensor]]) -> None:
        self.run, self.outputs = run, entry.outputs
        self._names, self._weights = [one.name for one in entry.inputs], weights

    def bind(self, cache: dict[str, Tensor], layer: int = 0) -> _BoundStage:
        """The stage on the weights and the cache of a layer."""
        known = self._weights[layer]
        inputs = [known.get(name, cache.get(numbered(name, layer))) for name in self._names]
        missing = [(i, name) for i, name in enumerate(self._names) if inputs[i] is None]
        return _BoundStage(self.run, self.outputs, inputs, missing)


@dataclass
class _BoundStage:
    """A stage and its list of inputs. `missing` are the program's arguments and the results of stages before it."""

    run: Program
    outputs: tuple[str, ...]
    inputs: list[Tensor | None]
    missing: list[tuple[int, str]]

    def __call__(self, tensors: dict[str, Tensor]) -> None:
        """Run, with what is missing from `tensors`; adds the results there."""
        inputs = self.inputs.copy()
        for index, name in self.missing:
            inputs[index] = tensors[name]
        tensors.update(zip(self.outputs, self.run(inputs), strict=True))  # type: ignore[arg-type]


class _BoundProgram:
    """The stages of a program over one cache: begin, every layer, end."""

    def __init__(self, stages: tuple[_Stage, ...], cache: dict[str, Tensor], layers: int) -> None:
        begin, layer, end = stages
        self._stages = [begin.bind(cache), *(layer.bind(cache, index) for index in range(layers)), end.bind(cache)]

    @property
    def writes_next_tokens(self) -> bool:
        """Whether it takes the argument `next_tokens` and writes the most probable tokens there."""
        return NEXT_TOKENS in {name for _, name in self._stages[-1].missing}

    def __call__(self, **arguments: Tensor) -> Tensor:
        """Logits; the cache is updated in place."""
        for stage in self._stages:
            stage(arguments)
        return arguments["logits"]


def _load_library(path: Path, device: torch.device) -> Program:
    """A stage's program; RuntimeUnavailable if the system does not load its library."""
    try:
        return load_library(path, device)
    except (OSError, RuntimeError) as error:
        raise RuntimeUnavailable(f"{path} cannot be loaded: {_reason(path, error)}") from error


def _reason(path: Path, error: Exception) -> str:
    if is_noexec(path.parent):
        return f"{path.parent} is on a file system mounted noexec; copy the bundle to one that programs may run from"
    return str(error).splitlines()[0]


def _check_target(target: Target, versions: dict[str, str], device: str | None) -> torch.device:
    """The device to run on; RuntimeUnavailable, before any native code is loaded, if this machine is another one."""
    wanted = torch.device(device or target.device)
    again = "export it again on this machine: megalodon-export aoti"
    if wanted.type != target.device:
        raise RuntimeUnavailable(f"the AOTInductor programs are for {target.device}, not {wanted.type}; {again}")
    compiled, here = versions["torch"].split("+")[0], torch.__version__.split("+")[0]
    if compiled.split(".")[:2] != here.split(".")[:2]:
        raise RuntimeUnavailable(
            f"the AOTInductor programs were compiled with torch {compiled}, this is {here}; {again}"
        )
    if wanted.type == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeUnavailable(f"the AOTInductor programs are for CUDA and this machine has none; {again}")
        require_device(wanted)
        major, minor = torch.cuda.get_device_capability(wanted)
        if target.architecture != f"sm_{major}{minor}":
            raise RuntimeUnavailable(
                f"the AOTInductor programs are for {target.architecture}, this GPU is sm_{major}{minor}; {again}"
            )
        return wanted
    if target.architecture != platform.machine():
        raise RuntimeUnavailable(
            f"the AOTInductor programs are for {target.architecture}, this is {platform.machine()}; {again}"
        )
    missing = sorted(set(target.cpu_features or ()) - set(cpu_features()))
    if missing:
        raise RuntimeUnavailable(
            f"the AOTInductor programs use CPU instructions that this machine lacks ({', '.join(missing)}); {again}, "
            "or export with --portable"
        )
    return wanted
