"""Export as ONNX graphs: a checkpoint to a new bundle, or graphs added to a bundle that has other programs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from msgspec.structs import replace

from ..bundles.checkpoints import load_model
from ..bundles.labels import write_graph_labels
from ..bundles.manifest import CONSTANTS, DTYPES, WEIGHTS, Manifest, ModelDtype
from ..bundles.writing import staged
from ..exporters import exporter
from ..exporters.manifest_types import OnnxPrograms, Programs
from ..exporters.programs import Limits
from ..model import MegalodonForCausalLM
from ..model.config import EMAForm
from ..runtimes.onnx_session import require_version
from .steps import Report, add_programs, finish, let_others_read, progress, write_checkpoint
from .versions import versions


def export_onnx(
    checkpoint: Path,
    destination: Path,
    dtype: ModelDtype | None = None,
    max_batch: int = 64,
    max_length: int | None = None,
    all_logits: bool = False,
    report: Report | None = None,
    ema_prefill: EMAForm | None = None,
    kernels: Sequence[str] = (),
) -> Manifest:
    """Export a checkpoint's graphs for ONNX Runtime to a bundle folder, and verify them; returns its manifest.

    `dtype` "float32" (default), "float16" (weights, keys and values alone) or "bfloat16", which ONNX Runtime has on
    CUDA only, so that it is verified only there. `ema_prefill` is the form in which prefill evaluates the EMA (default:
    the config's). `kernels` names GPU architectures, such as "sm_90": graphs with kernels for them are written beside
    the plain ones. That needs Triton and a C++ compiler, and no GPU.
    An existing bundle at `destination` is replaced at the end, or stays as it is if anything fails: CheckpointError,
    BundleError, CompileError, PlacementError, VerificationError, ValueError for limits, dtypes or architectures that do
    not exist.
    """
    report = report or progress(time.monotonic())
    dtype = dtype or "float32"
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype is {dtype!r}, expected float32, float16 or bfloat16")
    _check_can_run(dtype, kernels)
    with staged(destination) as staging:
        report(f"loading {checkpoint}")
        stored = torch.float32 if dtype == "float16" else DTYPES[dtype]
        model = load_model(checkpoint, stored, ema_prefill=ema_prefill)
        if dtype == "float16":
            halve(model)
        limits = Limits.of(model.config, max_batch, max_length)
        write_checkpoint(model, checkpoint, staging)
        entry = _build(staging, dtype, limits, all_logits, report)
        if kernels:
            _build_kernels(staging, dtype, limits, kernels, all_logits, report)
        manifest = _labelled(staging, Manifest.of(model.config, dtype, Programs(onnx=entry), versions()))
        sealed = finish(staging, checkpoint, manifest, "onnx", report, verified=_can_verify(dtype))
    report(f"wrote {destination}")
    return sealed


def halve(model: MegalodonForCausalLM) -> None:
    """Make a model's weights float16, but those of the EMA: half precision keeps too few digits of its phases."""
    for name, parameter in model.named_parameters():
        if ".cema." not in name:
            parameter.data = parameter.data.half()


def add_onnx(
    folder: Path,
    max_batch: int = 64,
    max_length: int | None = None,
    report: Report | None = None,
    kernels: Sequence[str] = (),
) -> Manifest:
    """Add ONNX programs to a bundle, beside those that it has; returns its manifest.

    Raises what `export_onnx` raises, and BundleError if the bundle has such programs.
    """
    report = report or progress(time.monotonic())

    def build(staging: Path, manifest: Manifest) -> Manifest:
        _check_can_run(manifest.dtype, kernels)
        limits = Limits.of(manifest.config, max_batch, max_length)
        entry = _build(staging, manifest.dtype, limits, manifest.programs.all_logits, report)
        if kernels:
            _build_kernels(staging, manifest.dtype, limits, kernels, manifest.programs.all_logits, report)
        return _labelled(staging, manifest.replace(programs=manifest.programs.including("onnx", entry)))

    return add_programs(folder, "onnx", build, report, lambda manifest: _can_verify(manifest.dtype))


def _build(staging: Path, dtype: ModelDtype, limits: Limits, all_logits: bool, report: Report) -> OnnxPrograms:
    """Write the graphs beside the checkpoint in a staged folder."""
    entry: OnnxPrograms = exporter("onnx").build(staging, (WEIGHTS, CONSTANTS), dtype, limits, report, all_logits)
    let_others_read(staging, entry.files)
    return replace(entry, versions=versions())


def _labelled(staging: Path, manifest: Manifest) -> Manifest:
    """The manifest, once the new graphs of a staged folder say the same as it does."""
    assert manifest.programs.onnx is not None
    write_graph_labels(staging, manifest.to_json()["config"], manifest.dtype, manifest.programs.onnx)
    return manifest


def _build_kernels(
    staging: Path, dtype: ModelDtype, limits: Limits, kernels: Sequence[str], all_logits: bool, report: Report
) -> None:
    """Write the graphs with kernels beside the plain graphs in a staged folder."""
    build = exporter("onnx_kernels").build
    build(staging, (WEIGHTS, CONSTANTS), dtype, limits, tuple(kernels), report, all_logits)


def _can_verify(dtype: ModelDtype) -> bool:
    """Whether this machine runs graphs of a dtype: bfloat16 is for CUDA alone."""
    return dtype != "bfloat16" or torch.cuda.is_available()


def _check_can_run(dtype: ModelDtype, kernels: Sequence[str]) -> None:
    require_version()
    if kernels:
        _check_kernels(dtype, kernels)
    elif not _can_verify(dtype):
        raise ValueError(
            "bfloat16 graphs run on CUDA only, and this machine has none to verify them on; export float32 or float16, "
            "or make graphs with kernels, to be verified on a GPU: --kernels"
        )


def _check_kernels(dtype: ModelDtype, kernels: Sequence[str]) -> None:
    """ValueError, before anything is written, for what graphs with kernels cannot be made of or with."""
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"the kernels compute in float32 and bfloat16, not in {dtype}; leave out --kernels")
    if find_spec("triton") is None:
        raise ValueError("--kernels needs Triton, which comes with a CUDA build of torch, or: pip install triton")
    import_module("..exporters.onnx_kernels.machine_code", __package__).check_architectures(kernels)
