"""Exporting a checkpoint to a bundle: staged beside its destination, verified, then renamed into place."""

from __future__ import annotations

import json
import platform
import shutil
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace

from ..bundles import bundle
from ..bundles.checkpoints import COMPANIONS, load_model
from ..bundles.manifest import CONSTANTS, DTYPES, WEIGHTS, Manifest, ModelDtype
from ..bundles.weights import save_constants, with_sources
from ..exporters import exporter
from ..exporters.manifest_types import AotiPrograms, Programs
from ..exporters.programs import Limits
from ..model import MegalodonForCausalLM, freeze_constants, quantize
from ..model.config import WeightFormat

Report = Callable[[str], None]
_CARD_SECTION = "## This bundle"
_PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "tokenizers",
    "onnx",
    "onnxruntime-gpu",
    "onnxruntime",
    "triton",
    "torchao",
)


def default_device() -> str:
    """This machine's best device."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def progress(started: float) -> Report:
    """A reporter that prints to stderr what is happening and how many seconds have passed."""
    return lambda message: print(f"[{time.monotonic() - started:6.1f} s] {message}", file=sys.stderr, flush=True)


def export_aoti(
    checkpoint: Path,
    destination: Path,
    device: str | None = None,
    dtype: ModelDtype | None = None,
    max_batch: int = 64,
    max_length: int | None = None,
    all_logits: bool = False,
    portable: bool = False,
    report: Report | None = None,
    weight_format: WeightFormat = "float",
    group_size: int | None = None,
) -> Manifest:
    """Export a checkpoint with AOTInductor to a bundle folder, and verify it; returns its manifest.

    `dtype` "float32" or "bfloat16" (default: bfloat16 on CUDA, float32 on a CPU). `weight_format` "int8" or "int4"
    quantises linear layers (`model/quantized.py`); "float" leaves the checkpoint's as they are. An existing bundle
    at `destination` is replaced at the end, or stays as it is if anything fails: CheckpointError, CompileError,
    BundleError, VerificationError, ValueError for limits or dtypes that do not exist.
    """
    report = report or progress(time.monotonic())
    device = device or default_device()
    dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    report(f"loading {checkpoint}")
    model = load_model(checkpoint, DTYPES[dtype])
    if weight_format != "float":
        quantize(model, weight_format, group_size)
    limits = Limits.of(model.config, max_batch, max_length)
    with bundle.staged(destination) as staging:
        write_checkpoint(model, checkpoint, staging)
        entry = build_aoti(staging, model.config.num_layers, device, dtype, limits, report, all_logits, portable)
        manifest = Manifest.of(model.config, dtype, Programs(aoti=entry), versions())
        sealed = finish(staging, checkpoint, manifest, "aoti", report)
    report(f"wrote {destination}")
    return sealed


def build_aoti(staging: Path, layers: int, *options: Any) -> AotiPrograms:
    """Compile programs for the checkpoint in a bundle's folder, and say where their weights are in its files."""
    entry: AotiPrograms = exporter("aoti").build(staging, staging / "aoti", *options)
    return replace(entry, stages=with_sources(entry.stages, layers, staging))


def finish(staging: Path, source: Path, manifest: Manifest, kind: str, report: Report) -> Manifest:
    """Verify the new programs of a staged bundle, then write its card, its manifest and what was measured."""
    from ..bundles.verify import verify_folder

    report("checking the programs against the model in eager mode")
    parity = verify_folder(staging, manifest, [kind], report=report)
    others = manifest.programs.by_runtime().keys() - {kind}
    if others and (source / bundle.PARITY).is_file():  # were in the bundle already, with what was measured of them
        earlier = json.loads((source / bundle.PARITY).read_text())["results"]
        parity["results"] = [row for row in earlier if row["runtime"] in others] + parity["results"]
    (staging / "README.md").write_text(model_card(manifest, source, parity))
    sealed = bundle.seal(staging, manifest)
    bundle.update_parity(staging, parity)
    return sealed


def write_checkpoint(model: MegalodonForCausalLM, checkpoint: Path, folder: Path) -> None:
    """Write a model's weights, derived constants and companions into a bundle's folder."""
    model.save_pretrained(folder)
    for name in COMPANIONS:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)
    freeze_constants(model)
    save_constants(model, folder)
    for name in (WEIGHTS, CONSTANTS):  # safetensors lets only their owner read them
        shutil.copymode(folder / "config.json", folder / name)


def versions() -> dict[str, str]:
    """What made a bundle: this package, its dependencies, Python, CUDA."""
    found = {"megalodon-export": version("megalodon-export"), "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["torch"] = str(torch.__version__)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def model_card(manifest: Manifest, checkpoint: Path, parity: dict[str, Any]) -> str:
    """The bundle's README: the checkpoint's own card, then what this bundle is and how exact it is."""
    card = checkpoint / "README.md"
    own = card.read_text() if card.is_file() else f"# {checkpoint.name}\n\nNo model card came with the weights."
    own = own.split(_CARD_SECTION)[0].rstrip()  # where the checkpoint is a bundle
    targets = {name: entry.target for name, entry in manifest.programs.by_runtime().items()}
    programs = ", ".join(f"{name} for {t.device} ({t.architecture})" for name, t in targets.items())
    rows = "\n".join(
        f"| {row['runtime']} | {row['case']} | {row['logits']:.1e} | {row['cache']:.1e} | {row['bound']:.0e} |"
        for row in parity["results"]
    )
    return f"""{own}

{_CARD_SECTION}

Exported with megalodon-export {manifest.versions["megalodon-export"]} and torch {manifest.versions["torch"]}:
{programs}; {manifest.dtype}{_weights_in_words(manifest)}.
Run it with `megalodon-export generate BUNDLE --prompt TEXT`.
It holds native code: load bundles only from those you trust. Largest differences from the eager model at export:

| runtime | case | logits | cache (relative) | bound |
|---|---|---|---|---|
{rows}
"""


def _weights_in_words(manifest: Manifest) -> str:
    """What the card adds about quantised weights, and how transformers reads them."""
    if manifest.weight_format == "float":
        return ""
    words = f", linear layers in {manifest.weight_format}"
    return f"{words}.\ntransformers loads this folder too, quantised as it is, after `import megalodon_export`"
