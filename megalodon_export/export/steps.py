"""The steps that every export shares: write the checkpoint into a staged folder, verify the programs, seal the bundle.

with staged(destination) as staging:       # beside the destination; renamed into place at the end
    write_checkpoint(model, checkpoint, staging)
    programs = Programs(aoti=...)                   # compiled into `staging`
    finish(staging, checkpoint, Manifest.of(config, dtype, programs, versions()), "aoti", report)
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ..bundles import bundle
from ..bundles.checkpoints import COMPANIONS
from ..bundles.manifest import CONSTANTS, WEIGHTS, Manifest
from ..bundles.parity import read_parity
from ..bundles.verify import verify_folder
from ..bundles.weights import save_constants
from ..bundles.writing import seal, staged, update_parity
from ..model import MegalodonForCausalLM, freeze_constants
from .model_card import model_card

Report = Callable[[str], None]


def progress(started: float) -> Report:
    """A reporter that prints to stderr what is happening and how many seconds have passed."""
    return lambda message: print(f"[{time.monotonic() - started:6.1f} s] {message}", file=sys.stderr, flush=True)


def write_checkpoint(model: MegalodonForCausalLM, checkpoint: Path, folder: Path) -> None:
    """Write a model's weights, derived constants and companions into a bundle's folder."""
    model.save_pretrained(folder)
    for name in COMPANIONS:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)
    freeze_constants(model)
    save_constants(model, folder)
    let_others_read(folder, (WEIGHTS, CONSTANTS))


def let_others_read(folder: Path, files: tuple[str, ...]) -> None:
    """Give files the permissions of the folder's config.json: safetensors lets only their owner read its files."""
    for name in files:
        shutil.copymode(folder / "config.json", folder / name)


def finish(
    staging: Path, source: Path, manifest: Manifest, kind: str, report: Report, verified: bool = True
) -> Manifest:
    """Verify the new programs of a staged bundle, then write its card, its manifest and what was measured.

    `source` is the checkpoint, or the bundle that the programs of `kind` are added to. `verified=False` leaves the
    check to `megalodon-export verify` on a machine that can run them.
    """
    note = "checking the programs against the model in eager mode"
    report(note if verified else "no check of the programs, which run on CUDA alone: verify the bundle on a GPU")
    parity = verify_folder(staging, manifest, [kind] if verified else [], report=report)
    others = manifest.programs.by_runtime().keys() - {kind}
    if others and (earlier := read_parity(source, bundle.read(source, check="sizes"))):
        # Keep what was measured of the programs that were there before.
        parity["results"] = [row for row in earlier["results"] if row["runtime"] in others] + parity["results"]
    (staging / "README.md").write_text(model_card(manifest, source, parity))
    seal(staging, manifest)
    sealed = bundle.read(staging, check="sizes")  # what nobody could read must not replace anything
    update_parity(staging, sealed, parity)
    return sealed


def add_programs(
    folder: Path,
    kind: str,
    build: Callable[[Path, Manifest], Manifest],
    report: Report,
    can_verify: Callable[[Manifest], bool] = lambda manifest: True,
) -> Manifest:
    """Add programs to a bundle. `build` makes them in a copy, which replaces the bundle once they are verified.

    Where this machine cannot run them, `can_verify` says so; they are then added without that.

    BundleError if the bundle is damaged or has programs of this kind.
    """
    with staged(folder) as staging:
        report(f"checking {folder}")
        manifest = bundle.read(folder)
        read_parity(folder, manifest)
        if kind in manifest.programs.by_runtime():
            raise bundle.BundleError(
                f"{folder} has {kind} programs already; export to another folder, or replace it whole."
            )
        for name in manifest.files:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / name, staging / name)
        sealed = finish(staging, folder, build(staging, manifest), kind, report, can_verify(manifest))
    report(f"added {kind} programs to {folder}")
    return sealed
