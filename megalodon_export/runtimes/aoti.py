"""AOTInductor programs of a bundle, bound to one copy of the weights."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import DTYPES
from ..exporters.aoti import cpu_features
from ..exporters.programs import DECODE, PREFILL, Limits
from ..model import MegalodonCache, MegalodonConfig
from ..weights import WeightStore
from .base import Runtime, RuntimeUnavailable


class AotiRuntime(Runtime):
    """Runs `aoti/model.pt2`. The bundle's hashes must have been checked: this loads native code."""

    def __init__(self, folder: Path, manifest: dict[str, Any], device: str | None = None) -> None:
        from torch._C._aoti import AOTIModelPackageLoader

        entry = manifest["programs"].get("aoti")
        if entry is None:
            raise RuntimeUnavailable(f"{folder} has no AOTInductor programs; make them: megalodon-export aoti")
        chosen = _check_target(entry["target"], manifest["versions"], device)
        config = MegalodonConfig(**manifest["config"])
        super().__init__(config, DTYPES[manifest["dtype"]], chosen, Limits(**entry["limits"]), entry["all_logits"])
        store = WeightStore(folder, chosen)
        self._programs = {}
        for name in (PREFILL, DECODE):
            index = chosen.index if chosen.type == "cuda" and chosen.index is not None else -1
            # single-threaded: required for capture in a CUDA graph; this class is not for concurrent calls
            loader = AOTIModelPackageLoader(str(folder / "aoti" / entry["package"]), name, True, 1, index)
            loader.load_constants(
                store.bind(entry["constants"][name]), use_inactive=False, check_full_update=True, user_managed=True
            )
            self._programs[name] = loader
        self._store = store  # the programs point into it

    def run_prefill(self, token_ids: Tensor, lengths: Tensor, cache: MegalodonCache) -> Tensor:
        """One call of the compiled prefill."""
        logits: Tensor = self._programs[PREFILL].run([token_ids, lengths, *cache.tensors()])[0]
        return logits

    def run_decode(self, token_ids: Tensor, cache: MegalodonCache) -> Tensor:
        """One call of the compiled decode."""
        logits: Tensor = self._programs[DECODE].run([token_ids, *cache.tensors()])[0]
        return logits


def _check_target(target: dict[str, Any], versions: dict[str, str], device: str | None) -> torch.device:
    """The device to run on; RuntimeUnavailable, before any native code is loaded, if this machine is another one."""
    wanted = torch.device(device or target["device"])
    again = "export it again on this machine: megalodon-export aoti"
    if wanted.type != target["device"]:
        raise RuntimeUnavailable(f"the AOTInductor programs are for {target['device']}, not {wanted.type}; {again}")
    compiled, here = versions["torch"].split("+")[0], torch.__version__.split("+")[0]
    if compiled.split(".")[:2] != here.split(".")[:2]:
        raise RuntimeUnavailable(
            f"the AOTInductor programs were compiled with torch {compiled}, this is {here}; {again}"
        )
    if wanted.type == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeUnavailable(f"the AOTInductor programs are for CUDA and this machine has none; {again}")
        major, minor = torch.cuda.get_device_capability(wanted)
        if target["architecture"] != f"sm_{major}{minor}":
            raise RuntimeUnavailable(
                f"the AOTInductor programs are for {target['architecture']}, this GPU is sm_{major}{minor}; {again}"
            )
        return wanted
    if target["architecture"] != platform.machine():
        raise RuntimeUnavailable(
            f"the AOTInductor programs are for {target['architecture']}, this is {platform.machine()}; {again}"
        )
    missing = sorted(set(target["cpu_features"]) - set(cpu_features()))
    if missing:
        raise RuntimeUnavailable(
            f"the AOTInductor programs use CPU instructions that this machine lacks ({', '.join(missing)}); {again}, "
            "or export with --portable"
        )
    return wanted
