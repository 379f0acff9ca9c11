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
from ..exporters.manifest_types import CompiledProgram, CompiledStage, StageInput, Target
from ..exporters.programs import DECODE, DECODE_ONE, LAYER_INDEX, NEXT_TOKENS, PREFILL, ProgramName
from ..exporters.target import cpu_features
from ..exporters.torch_internals import load_program
from ..model import MegalodonCache
from ..model.cache import LayerCache
from .base import Runtime, RuntimeUnavailable


class AotiRuntime(Runtime):
    """Runs `aoti/model.pt2`. The bundle's hashes must have been checked: this loads native code."""

    def __init__(self, folder: Path, manifest: Manifest, device: str | None = None) -> None:
        entry = manifest.programs.aoti
        if entry is None:
            raise RuntimeUnavailable(f"{folder} has no AOTInductor programs; make them: megalodon-export aoti")
        chosen = _check_target(entry.target, manifest.versions, device)
        super().__init__(manifest.config, manifest.torch_dtype, chosen, entry.limits, entry.all_logits)
        self._load(folder / "aoti" / entry.package, entry.stages, WeightStore(folder, chosen).bind)

    def _load(
        self,
        package: Path,
        stages: dict[ProgramName, CompiledProgram],
        bind: Callable[[tuple[StageInput, ...], int], dict[str, Tensor]],
    ) -> None:
        """Load the stages of both programs; `bind` finds the weights among a stage's inputs, for a layer."""
        index = -1 if self.device.type != "cuda" or self.device.index is None else self.device.index
        layers = range(self.config.num_layers)

        def stage(entry: CompiledStage) -> _Stage:
            run = load_program(package, entry.name, index)
            return _Stage(run, entry, [bind(entry.inputs, layer) for layer in layers])

        self._programs = {name: _Program(*map(stage, program.stages)) for name, program in stages.items()}

    def run_prefill(self, token_ids: Tensor, lengths: Tensor, cache: MegalodonCache) -> Tensor:
        """One call of the compiled prefill."""
        return self._programs[PREFILL](cache, {"token_ids": token_ids, "lengths": lengths})

    def run_decode(self, token_ids: Tensor, cache: MegalodonCache) -> Tensor:
        """One call of the compiled decode, or of that for one stream."""
        choice = torch.empty(2, cache.batch, dtype=torch.int64, device=self.device)
        return self._decode(cache)(cache, {"token_ids": token_ids, NEXT_TOKENS: choice})

    def run_greedy(self, token_ids: Tensor, cache: MegalodonCache, choice: Tensor) -> None:
        """On a GPU the program chooses."""
        program = self._decode(cache)
        if not program.chooses:
            return super().run_greedy(token_ids, cache, choice)
        program(cache, {"token_ids": token_ids, NEXT_TOKENS: choice})

    def _decode(self, cache: MegalodonCache) -> _Program:
        one = cache.batch == 1 and DECODE_ONE in self._programs
        return self._programs[DECODE_ONE if one else DECODE]


class _Stage:
    """A compiled stage and, for every layer, its list of inputs with the weights in their places."""

    def __init__(
        self, run: Callable[[list[Tensor]], list[Tensor]], entry: CompiledStage, weights: list[dict[str, Tensor]]
    ) -> None:
        self._run, self._outputs = run, entry.outputs
        names = [one.name for one in entry.inputs]
        self._inputs = [[bound.get(name) for name in names] for bound in weights]
        prefix = f"layers.{LAYER_INDEX}."
        of_layer = {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        self._of_layer = [(names.index(name), field) for name, field in of_layer.items()]
        others = [one.name for one in entry.inputs if one.kind != "weight" and one.name not in of_layer]
        self._others = [(names.index(name), name) for name in others]

    @property
    def arguments(self) -> set[str]:
        """What it takes besides weights and a layer's cache."""
        return {name for _, name in self._others}

    def __call__(self, tensors: dict[str, Tensor], layer: int = 0, cache: LayerCache | None = None) -> None:
        """Run on the named tensors, and on a layer's weights and cache; adds what comes out to the tensors."""
        inputs = self._inputs[layer].copy()
        for place, name in self._others:
            inputs[place] = tensors[name]
        for place, field in self._of_layer:
            inputs[place] = getattr(cache, field)
        tensors.update(zip(self._outputs, self._run(inputs), strict=True))  # type: ignore[arg-type]


@dataclass
class _Program:
    """The stages of a program, run over the layers of a cache."""

    begin: _Stage
    layer: _Stage
    end: _Stage

    @property
    def chooses(self) -> bool:
        """Whether it writes the most probable tokens into its argument `next_tokens`."""
        return NEXT_TOKENS in self.end.arguments

    def __call__(self, cache: MegalodonCache, tensors: dict[str, Tensor]) -> Tensor:
        """Logits; the cache is updated in place."""
        tensors |= {f"final.{field}": tensor for field, tensor in vars(cache.final).items()}
        self.begin(tensors)
        for index, layer_cache in enumerate(cache.layers):
            self.layer(tensors, index, layer_cache)
        self.end(tensors)
        return tensors["logits"]


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
