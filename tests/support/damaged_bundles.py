"""Damage to bundles, by name, with what the error says: to small folders of any bytes, and to real exports."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file

from megalodon_export.bundles import bundle
from megalodon_export.bundles.labels import (
    GRAPHS,
    MARK,
    append_graph_label,
    library_names,
    read_graph_labels,
    write_labels,
)
from megalodon_export.bundles.manifest import Manifest
from megalodon_export.bundles.sealing import sealed_json
from megalodon_export.bundles.writing import seal, staged
from megalodon_export.exporters.manifest_types import Programs
from megalodon_export.model import ModelConfig

PROGRAMS = bytes(range(256)) * 8192  # 2 MiB: more than one read of the hash function
SMALL = ModelConfig(
    **{"vocab_size": 16, "model_dim": 8, "num_layers": 1, "z_dim": 4, "value_dim": 8, "ffn_hidden_dim": 8},
    **{"cema_ndim": 2, "chunk_size": 8, "norm_num_groups": 2},
)
Damage = tuple[Callable[[Path], object], str]
Change = tuple[Callable[[dict[str, Any]], object], str]


def small_manifest() -> Manifest:
    """The manifest of a bundle without programs."""
    return Manifest.of(SMALL, "float32", Programs(), {"megalodon-export": "1.2.3", "torch": "2.13.0"})


def seal_small(folder: Path) -> Manifest:
    """Seal a folder as a bundle without programs, beside whatever is in it."""
    (folder / "config.json").write_text(json.dumps(asdict(SMALL)))
    weights = {"model.embed.weight": torch.ones(16, 8), "model.layers.0.attn.gamma": torch.ones(2, 4)}
    save_file(weights, folder / "model.safetensors")
    save_file({}, folder / "constants.safetensors")
    return seal(folder, small_manifest())


def write(destination: Path, programs: bytes = PROGRAMS) -> None:
    """Seal a small bundle with a file of any bytes in its folder `aoti`."""
    with staged(destination) as staging:
        (staging / "aoti").mkdir()
        (staging / "aoti" / "programs.pt2").write_bytes(programs)
        seal_small(staging)


def edit(folder: Path, change: Callable[[dict[str, Any]], object], file: str = "manifest.json") -> None:
    """Change the manifest of a bundle in place, and seal it again: what it says is read, and judged."""
    edit_unsealed(folder, change, file)
    reseal(folder, file)


def edit_unsealed(folder: Path, change: Callable[[dict[str, Any]], object], file: str = "manifest.json") -> None:
    """Change the manifest of a bundle in place, and leave its seal as it was."""
    found = json.loads((folder / file).read_text())
    change(found)
    (folder / file).write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def reseal(folder: Path, file: str = "manifest.json") -> None:
    """Give a JSON file of a bundle the seal of its content."""
    data, _ = sealed_json(json.loads((folder / file).read_text()))
    (folder / file).write_bytes(data)


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


# Texts that one JSON parser or another accepts, and what is wrong with them.
ODD_JSON: dict[str, tuple[bytes, str]] = {
    "marked": (b"\xef\xbb\xbf{}", "a byte order mark"),
    "UTF-16": ("{}".encode("utf-16-le"), ""),
    "not a number": (b'{"a": NaN}', ""),
    "infinite": (b'{"a": -Infinity}', ""),
    "large": (b'{"a": 1e400}', ""),
    "wide": (b'{"a": 9223372036854775808}', "a whole number beyond 64 bits"),
    "wide negative": (b'{"a": -9223372036854775809}', "a whole number beyond 64 bits"),
    "long": (b'{"a": ' + b"9" * 10**4 + b"}", "a whole number beyond 64 bits"),
    "surrogate": (b'{"a": "\\ud800"}', ""),
    "surrogate key": (b'{"\\udfff": 1}', ""),
    "encoded surrogate": (b'{"a": "\xed\xa0\x80"}', ""),
    "duplicate": (b'{"a": {"b": 1, "b": 1}}', "a key that an object has twice"),
    "nested": (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nested deeper than 100"),
    "followed": (b"{}\0", ""),
    "control": (b'{"a": "\n"}', ""),
    "leading zero": (b'{"a": 01}', ""),
    "comma": (b'{"a": 1,}', ""),
    "empty": (b"", ""),
}

# The damage to a bundle of `write`.
SMALL_DAMAGE: dict[str, Damage] = {
    "flipped byte": (
        lambda p: flip(p / "aoti/programs.pt2"),
        r"aoti/programs\.pt2: sha256 [0-9a-f]{64} expected, [0-9a-f]{64} found",
    ),
    "missing": (
        lambda p: (p / "aoti/programs.pt2").unlink(),
        rf"aoti/programs\.pt2: a file of {len(PROGRAMS)} bytes expected, none",
    ),
    "truncated": (lambda p: os.truncate(p / "aoti/programs.pt2", 9), rf"{len(PROGRAMS)} bytes expected, 9 found"),
    "name to obey": (lambda p: (p / "\x1b[2J\n\x7f").write_bytes(b""), r"  \\x1b\[2J\\x0a\\x7f: not listed"),
    "name to turn": (lambda p: (p / "\u202ename").write_bytes(b""), r"  \\u202ename: not listed"),
    "name of bytes": (lambda p: Path(os.fsdecode(bytes(p) + b"/\xff\xc2\x9b")).touch(), r"  \\xff\\x9b: not listed"),
    "more in an entry": (lambda p: edit(p, lambda m: m["files"]["config.json"].update(a=1)), "more than a size and a"),
    "itself listed": (
        lambda p: edit(p, lambda m: m["files"].update({"parity.json": m["files"]["config.json"]})),
        "lists neither itself nor parity.json",
    ),
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
    **{
        f"{name} JSON": (lambda p, data=data: (p / "manifest.json").write_bytes(data), rf"unreadable \(.*{why}")
        for name, (data, why) in ODD_JSON.items()
    },
    "edited": (lambda p: edit_unsealed(p, lambda m: m.update(created="today")), "its seal does not match its content"),
    "seal of zeros": (lambda p: edit_unsealed(p, lambda m: m.update(seal="0" * 64)), "its seal does not match"),
    "no seal": (lambda p: edit_unsealed(p, lambda m: m.pop("seal")), '"seal" expected at its end, none found'),
    "seal elsewhere": (
        lambda p: edit_unsealed(p, lambda m: m.update(files=m.pop("files"))),
        '"seal" expected at its end, none found',
    ),
    "control character": (
        lambda p: edit(p, lambda m: m.update(created="\x1b[2J")),
        r"unreadable \(a control character in a string\)",
    ),
    "no version": (lambda p: edit(p, lambda m: m.pop("schema_version")), "4 expected, None found. Export it again"),
    "odd version": (lambda p: edit(p, lambda m: m.update(schema_version=True)), "4 expected, True found"),
    "older version": (lambda p: edit(p, lambda m: m.update(schema_version=2)), "4 expected, 2 found. Export it again"),
    "newer version": (lambda p: edit(p, lambda m: m.update(schema_version=5)), "4 expected, 5 found. Upgrade"),
    "version of many bits": (lambda p: edit(p, lambda m: m.update(schema_version=2**63 - 1)), "4 expected, 9223372"),
    "version beyond 64 bits": (
        lambda p: edit(p, lambda m: m.update(schema_version=2**63)),
        "a whole number beyond 64 bits",
    ),
    "version before seals": (
        lambda p: edit_unsealed(p, lambda m: (m.update(schema_version=3), m.pop("seal"))),
        "4 expected, 3 found. Export it again",
    ),
    "no files": (lambda p: edit(p, lambda m: m.pop("files")), '"files".*expected'),
    "no size": (lambda p: edit(p, lambda m: m["files"]["model.safetensors"].pop("size")), "no whole number"),
    "no hash": (lambda p: edit(p, lambda m: m["files"]["model.safetensors"].pop("sha256")), "no sha256"),
}

# The damage to the parity report of a bundle.
PARITY_DAMAGE: dict[str, Damage] = {
    "flipped byte": (lambda p: flip(p / "parity.json"), "its seal does not match its content|unreadable"),
    "truncated": (lambda p: truncate(p / "parity.json"), '"seal" expected at its end, none found'),
    "edited": (
        lambda p: edit_unsealed(p, lambda r: r["results"].pop(), "parity.json"),
        "its seal does not match its content",
    ),
    "no seal": (lambda p: edit_unsealed(p, lambda r: r.pop("seal"), "parity.json"), '"seal" expected at its end'),
    "another bundle's": (lambda p: edit(p, lambda r: r.update(manifest="0" * 64), "parity.json"), "on another bundle"),
    "an older manifest's": (lambda p: edit(p, lambda m: m.update(created="today")), "before this one was changed"),
    "not a number": (
        lambda p: edit(p, lambda r: r["results"][0].update(logits="1"), "parity.json"),
        r"`float`, got `str` - at `\$.results\[0\].logits`",
    ),
    "no results": (lambda p: edit(p, lambda r: r.pop("results"), "parity.json"), "missing required field `results`"),
    "a list": (lambda p: (p / "parity.json").write_text("[]"), "a JSON object expected, list found"),
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
    "a newer schema": (lambda f: edit(f, lambda m: m.update(schema_version=99)), "schema_version 4 expected, 99 found"),
    "no schema": (lambda f: edit(f, lambda m: m.pop("schema_version")), "schema_version 4 expected, None found"),
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


def relabel(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a bundle says about its programs everywhere: as if it had been exported so."""
    edit(folder, change)
    manifest = msgspec.convert(json.loads((folder / "manifest.json").read_text()), Manifest)
    for name in library_names():
        path = folder / "aoti" / name
        data = path.read_bytes()
        end = len(data) - len(MARK) - 8
        path.write_bytes(data[: end - int.from_bytes(data[end : end + 8], "little")])
    if manifest.programs.aoti is not None:
        write_labels(folder, manifest.programs.aoti, manifest.versions["torch"])
    seal(folder, manifest)


def relabel_graphs(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Give a bundle's ONNX graphs other labels behind their own, and leave what the manifest says of them."""
    manifest, label = bundle.read(folder), msgspec.to_builtins(read_graph_labels(folder))
    change(label)
    for name in GRAPHS:
        append_graph_label(folder / f"{name}.onnx", {**label, "file": f"{name}.onnx"})
    seal(folder, manifest)


def edit_config(folder: Path, values: dict[str, Any]) -> None:
    """Change values in config.json and in the manifest, and make hashes and seal right again."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    entry = {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    edit(folder, lambda m: (m["config"].update(values), m["files"].update({"config.json": entry})))
