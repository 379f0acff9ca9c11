"""What is in a bundle, as data and as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from ..exporters.manifest_types import numbered
from ..generation.snapshot import state_size
from . import bundle
from .manifest import Manifest
from .parity import read_parity
from .strict_json import shown


def inspect(folder: Path) -> dict[str, Any]:
    """Facts about a bundle, from its manifest and parity.json; hashes are checked. Sizes in bytes."""
    manifest = bundle.read(folder)
    config, aoti = manifest.config, manifest.programs.aoti
    bound = {
        name: {
            (one.file, numbered(str(one.tensor), layer))
            for stage in program.stages
            for one in stage.weights
            for layer in range(config.num_layers)
        }
        for name, program in (aoti.stages.items() if aoti is not None else ())
    }
    return {
        "folder": str(folder),
        "created": manifest.created,
        "layers": config.num_layers,
        "model_dim": config.model_dim,
        "chunk_size": config.chunk_size,
        "dtype": manifest.dtype,
        "weight_format": config.weight_format,
        "state_bytes_per_stream": state_size(config, manifest.torch_dtype),
        "programs": {
            name: {"target": msgspec.to_builtins(entry.target), "limits": msgspec.to_builtins(entry.limits)}
            for name, entry in manifest.programs.by_runtime().items()
        },
        "weights": manifest.weights,
        "tensors_bound_by_each_program": {name: len(tensors) for name, tensors in bound.items()},
        "distinct_tensors_bound": len(set().union(*bound.values())),
        "weights_inside_programs": _weights_inside(folder, manifest),
        "files": {name: entry.size for name, entry in manifest.files.items()},
        "versions": manifest.versions,
        "parity": read_parity(folder, manifest),
    }


def _weights_inside(folder: Path, manifest: Manifest) -> bool:
    """Whether a library or a graph holds a copy of bytes from the middle of the weights."""
    with open(folder / manifest.weights, "rb") as file:
        file.seek((folder / manifest.weights).stat().st_size // 2)
        sample = file.read(256)
    aoti, onnx = manifest.programs.aoti, manifest.programs.onnx
    compiled = aoti.stages.values() if aoti is not None else ()
    files = [f"aoti/{stage.library}" for program in compiled for stage in program.stages]
    files += [graph.file for graph in onnx.graphs.values()] if onnx is not None else []
    return any(sample in (folder / name).read_bytes() for name in files)


def table(facts: dict[str, Any]) -> str:
    """The facts for a reader."""
    target = {name: entry["target"] for name, entry in facts["programs"].items()}
    bound = facts["tensors_bound_by_each_program"]
    rows = [
        ("bundle", shown(facts["folder"])),
        ("created", facts["created"]),
        ("model", f"{facts['layers']} layers, width {facts['model_dim']}, chunks of {facts['chunk_size']} tokens"),
        ("dtype", facts["dtype"]),
        ("linear", facts["dtype"] if facts["weight_format"] == "float" else facts["weight_format"]),
        ("state", f"{facts['state_bytes_per_stream']:,} bytes a stream, however long"),
    ]
    for name, entry in facts["programs"].items():
        limits = entry["limits"]
        where = ", ".join(str(target[name][key]) for key in ("device", "architecture"))
        rows.append((name, f"{where}; batch 1..{limits['max_batch']}, up to {limits['max_length']} tokens a call"))
    if facts["programs"]:
        inside = "and INSIDE the programs" if facts["weights_inside_programs"] else "none inside the programs"
        rows.append(("weights", f"once, in {facts['weights']}; {inside}"))
    if bound:
        uses = ", ".join(f"{count} by {name}" for name, count in bound.items())
        rows.append(("bound", f"{facts['distinct_tensors_bound']} tensors, constants included ({uses})"))
    rows += [("file", f"{size:>13,}  {name}") for name, size in facts["files"].items()]
    rows.append(("total", f"{sum(facts['files'].values()):>13,}"))
    if facts["parity"]:
        for result in facts["parity"]["results"]:
            difference = f"logits {result['logits']:.1e}, cache {result['cache']:.1e}"
            rows.append(("parity", f"{result['runtime']}, {result['case']}: {difference}"))
    rows.append(("made with", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())))
    return "\n".join(f"{label:<10} {value}" for label, value in rows)
