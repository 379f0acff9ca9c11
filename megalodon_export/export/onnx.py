"""Exporting a checkpoint's ONNX graphs to a bundle, and adding programs of one kind to a bundle that has others."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from msgspec.structs import replace

from ..bundles import bundle
from ..bundles.checkpoints import load_model
from ..bundles.manifest import CONSTANTS, DTYPES, WEIGHTS, Manifest, ModelDtype
from ..exporters import exporter
from ..exporters.manifest_types import OnnxPrograms, Programs
from ..exporters.programs import Limits
from ..model import MegalodonForCausalLM
from .aoti import Report, build_aoti, finish, progress, versions, write_checkpoint

Build = Callable[[Path, Manifest], Manifest]


def export_onnx(
    checkpoint: Path,
    destination: Path,
    dtype: ModelDtype | None = None,
    max_batch: int = 64,
    max_length: int | None = None,
    all_logits: bool = False,
    report: Report | None = None,
) -> Manifest:
    """Export a checkpoint's graphs for ONNX Runtime to a bundle folder, and verify them; returns its manifest.

    `dtype` "float32" (default), "float16" (weights, keys and values alone) or "bfloat16", which ONNX Runtime has on
    CUDA only, so that it is exported and verified only there. An existing bundle at `destination` is replaced at the
    end, or stays as it is if anything fails: CheckpointError, BundleError, PlacementError, VerificationError,
    ValueError for limits or dtypes that do not exist.
    """
    report = report or progress(time.monotonic())
    dtype = dtype or "float32"
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype is {dtype!r}, expected float32, float16 or bfloat16")
    _check_can_run(dtype)
    report(f"loading {checkpoint}")
    model = load_model(checkpoint, torch.float32 if dtype == "float16" else DTYPES[dtype])
    if dtype == "float16":
        halve(model)
    limits = Limits.of(model.config, max_batch, max_length)
    with bundle.staged(destination) as staging:
        write_checkpoint(model, checkpoint, staging)
        entry = _build(staging, dtype, limits, all_logits, report)
        manifest = Manifest.of(model.config, dtype, Programs(onnx=entry), versions())
        sealed = finish(staging, checkpoint, manifest, "onnx", report)
    report(f"wrote {destination}")
    return sealed


def halve(model: MegalodonForCausalLM) -> None:
    """Make a model's weights float16, but those of the EMA: half precision keeps too few digits of its phases."""
    for name, parameter in model.named_parameters():
        if ".cema." not in name:
            parameter.data = parameter.data.half()


def add_onnx(
    folder: Path, max_batch: int = 64, max_length: int | None = None, report: Report | None = None
) -> Manifest:
    """Add ONNX programs to a bundle, beside those that it has; returns its manifest. Errors as `export_onnx`."""
    report = report or progress(time.monotonic())

    def build(staging: Path, manifest: Manifest) -> Manifest:
        _check_can_run(manifest.dtype)
        limits = Limits.of(manifest.model_config, max_batch, max_length)
        entry = _build(staging, manifest.dtype, limits, manifest.programs.all_logits, report)
        return manifest.replace(programs=manifest.programs.including("onnx", entry))

    return _add(folder, "onnx", build, report)


def add_aoti(
    folder: Path,
    device: str,
    max_batch: int = 64,
    max_length: int | None = None,
    portable: bool = False,
    report: Report | None = None,
) -> Manifest:
    """Add AOTInductor programs for this machine to a bundle, beside those that it has; returns its manifest."""
    report = report or progress(time.monotonic())

    def build(staging: Path, manifest: Manifest) -> Manifest:
        config, programs = manifest.model_config, manifest.programs
        if manifest.dtype == "float16":
            raise ValueError("the bundle is float16, which AOTInductor programs are not made for; export another one")
        limits = Limits.of(config, max_batch, max_length)
        options = device, manifest.dtype, limits, report, programs.all_logits, portable
        entry = build_aoti(staging, config.num_layers, *options)
        # The versions name the torch that must run the new programs.
        return manifest.replace(programs=programs.including("aoti", entry), versions=versions())

    return _add(folder, "aoti", build, report)


def _add(folder: Path, kind: str, build: Build, report: Report) -> Manifest:
    """Build programs in a copy of a bundle, which replaces it when they are verified."""
    report(f"checking {folder}")
    manifest = bundle.read(folder)
    if kind in manifest.programs.by_runtime():
        raise bundle.BundleError(
            f"{folder} has {kind} programs already; export to another folder, or replace it whole."
        )
    with bundle.staged(folder) as staging:
        for name in manifest.files:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / name, staging / name)
        sealed = finish(staging, folder, build(staging, manifest), kind, report)
    report(f"added {kind} programs to {folder}")
    return sealed


def _build(staging: Path, dtype: str, limits: Limits, all_logits: bool, report: Report) -> OnnxPrograms:
    entry: OnnxPrograms = exporter("onnx").build(staging, (WEIGHTS, CONSTANTS), dtype, limits, report, all_logits)
    for name in entry.files:  # safetensors lets only their owner read them
        shutil.copymode(staging / "config.json", staging / name)
    return replace(entry, versions=versions())


def _check_can_run(dtype: str) -> None:
    if dtype == "bfloat16" and not torch.cuda.is_available():
        raise ValueError(
            "bfloat16 graphs run on CUDA only, and this machine has none to verify them on; export float32 or float16"
        )
