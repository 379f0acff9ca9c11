"""Export with AOTInductor: a checkpoint to a new bundle, or programs added to a bundle that has others."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from msgspec.structs import replace

from ..bundles.checkpoints import default_device, default_dtype, load_model
from ..bundles.labels import write_labels
from ..bundles.manifest import DTYPES, Manifest, ModelDtype
from ..bundles.weights import with_sources
from ..bundles.writing import staged
from ..exporters import exporter
from ..exporters.manifest_types import AotiPrograms, Programs
from ..exporters.programs import Limits
from ..generation.arguments import device as device_name
from ..model import quantize
from ..model.config import EMAForm, WeightFormat
from ..runtimes.base import require_device
from .steps import Report, add_programs, finish, progress, write_checkpoint
from .versions import versions


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
    ema_prefill: EMAForm | None = None,
) -> Manifest:
    """Export a checkpoint with AOTInductor to a bundle folder, and verify it; returns its manifest.

    `dtype` "float32" or "bfloat16" (default: bfloat16 on CUDA, float32 on a CPU). `weight_format` "int8" or "int4"
    quantises linear layers (`model/quantized.py`); "float" leaves the checkpoint's as they are. `ema_prefill` is the
    form in which prefill evaluates the EMA (default: the config's). An existing bundle at `destination` is replaced at
    the end, or stays as it is if anything fails: CheckpointError, CompileError, BundleError, VerificationError,
    ValueError for limits or dtypes that do not exist.
    """
    report = report or progress(time.monotonic())
    device = _device(device)
    dtype = dtype or default_dtype(device)
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    with staged(destination) as staging:
        report(f"loading {checkpoint}")
        model = load_model(checkpoint, DTYPES[dtype], ema_prefill=ema_prefill)
        if weight_format != "float":
            quantize(model, weight_format, group_size)
        limits = Limits.of(model.config, max_batch, max_length)
        write_checkpoint(model, checkpoint, staging)
        entry = _build(staging, model.config.num_layers, device, dtype, limits, report, all_logits, portable)
        manifest = Manifest.of(model.config, dtype, Programs(aoti=entry), versions())
        sealed = finish(staging, checkpoint, manifest, "aoti", report)
    report(f"wrote {destination}")
    return sealed


def add_aoti(
    folder: Path,
    device: str,
    max_batch: int = 64,
    max_length: int | None = None,
    portable: bool = False,
    report: Report | None = None,
) -> Manifest:
    """Add AOTInductor programs for this machine to a bundle, beside those that it has; returns its manifest.

    Raises what `export_aoti` raises, and BundleError if the bundle has such programs.
    """
    report, device = report or progress(time.monotonic()), _device(device)

    def build(staging: Path, manifest: Manifest) -> Manifest:
        config, programs = manifest.config, manifest.programs
        if manifest.dtype == "float16":
            raise ValueError("the bundle is float16, which AOTInductor programs are not made for; export another one")
        limits = Limits.of(config, max_batch, max_length)
        options = device, manifest.dtype, limits, report, programs.all_logits, portable
        entry = _build(staging, config.num_layers, *options)
        # A runtime compares the manifest's torch with its own, so it must be the one that compiled the new programs.
        return manifest.replace(programs=programs.including("aoti", entry), versions=versions())

    return add_programs(folder, "aoti", build, report)


def _device(given: str | None) -> str:
    """The device to compile for, which this machine must have."""
    chosen = device_name(given) or default_device()
    require_device(torch.device(chosen))
    return chosen


def _build(
    staging: Path,
    layers: int,
    device: str,
    dtype: ModelDtype,
    limits: Limits,
    report: Report,
    all_logits: bool,
    portable: bool,
) -> AotiPrograms:
    """Compile programs for the checkpoint in a staged folder, and say where their weights are in its files."""
    build = exporter("aoti").build
    entry: AotiPrograms = build(staging, staging / "aoti", device, dtype, limits, report, all_logits, portable)
    entry = replace(entry, stages=with_sources(entry.stages, layers, staging))
    write_labels(staging, entry, versions()["torch"])
    return entry
