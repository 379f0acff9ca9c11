"""`aoti`, `onnx` and `convert`: commands that make a bundle or a checkpoint."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import msgspec

from ..bundles.checkpoints import default_checkpoint, default_device
from ..bundles.manifest import DTYPES, Manifest
from ..bundles.parity import read_parity
from ..bundles.sentencepiece import write_tokenizer
from ..export.aoti import add_aoti, export_aoti
from ..export.onnx import add_onnx, export_onnx
from ..export.steps import progress
from ..exporters.onnx_names import GPU_ARCHITECTURES
from ..model.conversion import convert_megalodon_hf, convert_upstream
from .threads import set_threads

# Options that make no sense with --add, and what they are when they are not given.
_OF_A_NEW_BUNDLE = {
    **{"checkpoint": None, "out": None, "dtype": None, "all_logits": False, "ema_prefill": None},
    **{"weight_format": "float", "group_size": None},
}


def aoti(args: argparse.Namespace) -> None:
    """Export with AOTInductor."""
    device, report = args.device or default_device(), progress(time.monotonic())
    if args.add:
        _refuse_with_add(args)
        set_threads(args, args.add)
        manifest = add_aoti(args.add, device, args.max_batch, args.max_length, args.portable, report)
        return _print_exported(args, args.add, manifest)
    checkpoint, name = _checkpoint(args)
    suffix = "" if args.weight_format == "float" else f"-{args.weight_format}"
    destination = args.out or Path("artifacts") / f"{name}-aoti-{device.replace(':', '')}{suffix}"
    manifest = export_aoti(
        *(checkpoint, destination, device, args.dtype, args.max_batch, args.max_length, args.all_logits, args.portable),
        report=report,
        weight_format=args.weight_format,
        group_size=args.group_size,
        ema_prefill=args.ema_prefill,
    )
    _print_exported(args, destination, manifest)


def onnx(args: argparse.Namespace) -> None:
    """Export as ONNX graphs."""
    report = progress(time.monotonic())
    kernels = _architectures(args.kernels)
    if args.add:
        _refuse_with_add(args)
        set_threads(args, args.add)
        return _print_exported(args, args.add, add_onnx(args.add, args.max_batch, args.max_length, report, kernels))
    checkpoint, name = _checkpoint(args)
    destination = args.out or Path("artifacts") / f"{name}-onnx"
    options = args.dtype, args.max_batch, args.max_length, args.all_logits, report, args.ema_prefill, kernels
    _print_exported(args, destination, export_onnx(checkpoint, destination, *options))


def _architectures(given: str | None) -> tuple[str, ...]:
    """The architectures that `--kernels` names; none without it."""
    if given is None:
        return ()
    return GPU_ARCHITECTURES if given == "all" else tuple(given.split(","))


def convert(args: argparse.Namespace) -> None:
    """Convert another implementation's checkpoint."""
    function = convert_upstream if args.kind == "upstream" else convert_megalodon_hf
    config = function(args.source, args.destination, DTYPES[args.dtype] if args.dtype else None)
    said = write_tokenizer(args.destination)
    if said:
        print(said, file=sys.stderr)
    sizes = f"{config.num_layers} layers, width {config.model_dim}, chunks of {config.chunk_size} tokens"
    print(f"{args.destination}: {sizes}")


def _checkpoint(args: argparse.Namespace) -> tuple[Path, str]:
    """The checkpoint to export and its name; sets the number of threads for it."""
    checkpoint = args.checkpoint or default_checkpoint()
    set_threads(args, checkpoint)
    return checkpoint, "default" if args.checkpoint is None else checkpoint.resolve().name


def _refuse_with_add(args: argparse.Namespace) -> None:
    given = [name for name, absent in _OF_A_NEW_BUNDLE.items() if getattr(args, name, absent) != absent]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"--add takes the bundle's own weights and dtype; leave out {options}")


def _print_exported(args: argparse.Namespace, folder: Path, manifest: Manifest) -> None:
    total = sum(entry.size for entry in manifest.files.values())
    targets = {name: entry.target for name, entry in manifest.programs.by_runtime().items()}
    if args.json:
        facts = {"bundle": str(folder), "bytes": total, "dtype": manifest.dtype, **targets}
        print(json.dumps(msgspec.to_builtins(facts)))
        return
    devices = ", ".join(target.device for target in targets.values())
    parity = read_parity(folder, manifest) or {"results": []}
    checked = targets.keys() <= {row["runtime"] for row in parity["results"]}
    said = "programs equal to the eager model" if checked else "verify it on a GPU: megalodon-export verify"
    print(f"{folder}: {total:,} bytes, {manifest.dtype}, {devices}; {said}")
    name = shlex.quote(str(folder) if folder.parts[0][:1] != "-" else f"./{folder}")
    print(f'next: megalodon-export generate {name} --prompt "In the beginning"')
