"""Damage to bundles, by name, with what the error says: to small folders of any bytes, and to real exports."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megalodon_export.bundles.manifest import Manifest, ModelDtype
from megalodon_export.bundles.writing import seal, staged
from megalodon_export.exporters.manifest_types import Programs
from megalodon_export.model import MegalodonConfig

WEIGHTS = bytes(range(256)) * 8192  # 2 MiB: more than one read of the hash function
Damage = tuple[Callable[[Path], object], str]
Change = tuple[Callable[[dict[str, Any]], object], str]


def small_manifest(dtype: ModelDtype = "float32") -> Manifest:
    """The manifest of a bundle without programs."""
    return Manifest.of(MegalodonConfig(num_layers=1), dtype, Programs(), {})


def write(destination: Path, weights: bytes = WEIGHTS) -> None:
    """Seal a small bundle whose files hold any bytes."""
    with staged(destination) as staging:
        (staging / "aoti").mkdir()
        (staging / "aoti" / "programs.pt2").write_bytes(b"native")
        (staging / "model.safetensors").write_bytes(weights)
        seal(staging, small_manifest())


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest of a bundle in place."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    """Cut off the last byte of a file."""
    path.write_bytes(path.read_bytes()[:-1])


def link_file(path: Path) -> None:
    """Replace the weights by a symbolic link to them."""
    shutil.move(path / "model.safetensors", path.parent / "elsewhere")
    (path / "model.safetensors").symlink_to(path.parent / "elsewhere")


def link_folder(path: Path) -> None:
    """Replace the folder of programs by a symbolic link to it."""
    shutil.move(path / "aoti", path.parent / "elsewhere")
    (path / "aoti").symlink_to(path.parent / "elsewhere")


# The damage to a bundle of `write`.
SMALL_DAMAGE: dict[str, Damage] = {
    "flipped byte": (
        lambda p: flip(p / "model.safetensors"),
        r"model\.safetensors: sha256 [0-9a-f]{64} expected, [0-9a-f]{64} found",
    ),
    "missing": (lambda p: (p / "aoti/programs.pt2").unlink(), r"aoti/programs\.pt2: a file of 6 bytes expected, none"),
    "truncated": (lambda p: os.truncate(p / "model.safetensors", 9), rf"{len(WEIGHTS)} bytes expected, 9 found"),
    "extra": (lambda p: (p / "aoti/x.so").write_bytes(b""), r"aoti/x\.so: not listed"),
    "hidden extra": (lambda p: (p / ".x").write_bytes(b""), r"\.x: not listed"),
    "second parity": (lambda p: (p / "aoti/parity.json").write_bytes(b""), r"aoti/parity\.json: not listed"),
    "linked file": (link_file, r"model\.safetensors: .*symbolic link"),
    "linked folder": (link_folder, r"aoti: .*symbolic link"),
    "pipe": (lambda p: os.mkfifo(p / "pipe"), "pipe: .*regular file expected"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), r"manifest\.json is missing"),
    "not JSON": (lambda p: (p / "manifest.json").write_text("{"), r"manifest\.json: a JSON object expected"),
    "not UTF-8": (lambda p: (p / "manifest.json").write_bytes(b"\xff"), r"manifest\.json: a JSON object expected"),
    "deep JSON": (lambda p: (p / "manifest.json").write_text("[" * 10**5), r"a JSON object expected"),
    "not an object": (lambda p: (p / "manifest.json").write_text("[]"), "object expected, list found"),
    "no version": (lambda p: edit(p, lambda m: m.pop("schema_version")), "3 expected, None found. Export it again"),
    "odd version": (lambda p: edit(p, lambda m: m.update(schema_version=True)), "3 expected, True found"),
    "older version": (lambda p: edit(p, lambda m: m.update(schema_version=2)), "3 expected, 2 found. Export it again"),
    "newer version": (lambda p: edit(p, lambda m: m.update(schema_version=4)), "3 expected, 4 found. Upgrade"),
    "no files": (lambda p: edit(p, lambda m: m.pop("files")), '"files".*expected'),
    "no size": (lambda p: edit(p, lambda m: m["files"]["model.safetensors"].pop("size")), "no whole number"),
    "no hash": (lambda p: edit(p, lambda m: m["files"]["model.safetensors"].pop("sha256")), "no sha256"),
}

# The damage to an export.
EXPORT_DAMAGE: dict[str, Damage] = {
    "flipped byte in a library": (lambda f: flip(f / "aoti/decode_layer.so"), "aoti/decode_layer.so: sha256"),
    "flipped byte in the package": (lambda f: flip(f / "aoti/model.pt2"), "aoti/model.pt2: sha256"),
    "flipped byte in the weights": (lambda f: flip(f / "model.safetensors"), "model.safetensors: sha256"),
    "flipped byte in the constants": (lambda f: flip(f / "constants.safetensors"), "constants.safetensors: sha256"),
    "truncated weights": (lambda f: truncate(f / "model.safetensors"), "model.safetensors: .* bytes expected"),
    "truncated package": (lambda f: truncate(f / "aoti/model.pt2"), "aoti/model.pt2: .* bytes expected"),
    "truncated manifest": (lambda f: truncate(f / "manifest.json") or truncate(f / "manifest.json"), "manifest.json"),
    "missing weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: .* none found"),
    "missing package": (lambda f: (f / "aoti/model.pt2").unlink(), "aoti/model.pt2: .* none found"),
    "missing config": (lambda f: (f / "config.json").unlink(), "config.json: .* none found"),
    "missing manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "an extra library": (
        lambda f: shutil.copy(f / "aoti/decode_layer.so", f / "aoti/more.so"),
        "aoti/more.so: not listed",
    ),
    "an edited hash": (
        lambda f: edit(f, lambda m: m["files"]["aoti/model.pt2"].update(sha256="0" * 64)),
        "aoti/model.pt2: sha256 0000",
    ),
    "an edited list": (lambda f: edit(f, lambda m: m["files"].pop("aoti/model.pt2")), "aoti/model.pt2: not listed"),
    "a newer schema": (lambda f: edit(f, lambda m: m.update(schema_version=99)), "schema_version 3 expected, 99 found"),
    "no schema": (lambda f: edit(f, lambda m: m.pop("schema_version")), "schema_version 3 expected, None found"),
}
OTHER_MACHINES: dict[str, Change] = {
    "torch": (lambda m: m["versions"].update(torch="2.1.0+cpu"), r"compiled with torch 2\.1\.0, this is"),
    "CPU feature": (
        lambda m: m["programs"]["aoti"]["target"]["cpu_features"].append("avx1024"),
        r"machine lacks \(avx1024\).*--portable",
    ),
    "architecture": (
        lambda m: m["programs"]["aoti"]["target"].update(architecture="riscv64"),
        "for riscv64, this is .*export it again",
    ),
    "device": (lambda m: m["programs"]["aoti"]["target"].update(device="cuda"), "for CUDA and this machine has none"),
    "no programs": (lambda m: m["programs"].clear(), "has no AOTInductor programs; make them: megalodon-export aoti"),
}
