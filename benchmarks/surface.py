"""Measure decode steps over presets, weight formats and batches, and draw each one's share of its roofline as a map.

    python benchmarks/surface.py --preset 200M 7.1B --format float int8 int4 --out DIR

A cliff is a batch whose step takes longer than that of a larger batch: the map marks it. `--runtime kernels` runs
the Triton kernels from Python in a captured graph; `aoti` compiles programs for each preset and format first.
The script writes DIR/surface.json after every row, and at the end DIR/surface.md and, with matplotlib, DIR/surface.png.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

import report
import torch
from engines import Subject, open_engine

from megalodon_export.bundles.manifest import DTYPES
from megalodon_export.measure.bench import PeakRates, fill, median_seconds, random_tokens
from megalodon_export.measure.roofline import decode_bytes, visible_tokens
from megalodon_export.model import PRESETS, preset
from megalodon_export.runtimes import Runtime

BATCHES = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)
CLIFF = 1.01  # times the step of a larger batch: less is within what two runs differ by


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", nargs="+", default=["200M"], choices=tuple(PRESETS))
    parser.add_argument("--layers", type=int, help="number of layers (default: the preset's)")
    parser.add_argument("--format", nargs="+", default=["float", "int8", "int4"], choices=("float", "int8", "int4"))
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--runtime", default="kernels", choices=("kernels", "aoti", "eager", "compile"))
    parser.add_argument("--programs", type=Path, help="aoti: a folder for the programs of every preset and format")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=tuple(DTYPES))
    parser.add_argument("--steps", type=int, default=50, help="decode steps timed; their median counts")
    parser.add_argument("--out", type=Path, required=True, help="folder for surface.json, surface.md and surface.png")
    args = parser.parse_args()
    if args.runtime == "aoti" and args.programs is None:
        parser.error("--runtime aoti needs --programs, a folder for what it compiles")
    return args


def main() -> None:
    """Measure every row, and write the report."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    peak = PeakRates.measure(torch.device(args.device), DTYPES[args.dtype])
    found: dict[str, Any] = {
        **report.head(args.device),
        **{"runtime": args.runtime, "dtype": args.dtype, "layers": args.layers},
        **{"copy_gigabytes_per_second": peak.copy / 1e9, "results": []},
    }
    for name in args.preset:
        for weight_format in args.format:
            found["results"] += measure(name, weight_format, args, peak)
            (args.out / "surface.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.out / "surface.md").write_text(markdown(found))
    draw(found, args.out / "surface.png")
    print(markdown(found))


def measure(name: str, weight_format: str, args: argparse.Namespace, peak: PeakRates) -> list[dict[str, Any]]:
    """One row for each batch: seconds of a step near the end of a chunk, its roofline's, and whether it is a cliff."""
    overrides = {"weight_format": weight_format} | ({"num_layers": args.layers} if args.layers else {})
    programs = args.programs / f"{name}-{weight_format}" if args.runtime == "aoti" else None
    subject = Subject(preset(name, **overrides), args.device, args.dtype, max(64, *args.batch), programs)
    runtime = open_engine(args.runtime, subject)
    rows = []
    for batch in args.batch:
        row: dict[str, Any] = {"preset": name, "format": weight_format, "batch": batch}
        try:
            row |= step(runtime, batch, args.steps, peak)
        except torch.OutOfMemoryError:
            row["error"] = "out of memory"
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        gc.collect()
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()
    timed = [row for row in rows if "seconds" in row]
    for row in timed:
        larger = [other["seconds"] for other in timed if other["batch"] > row["batch"]]
        row["cliff"] = any(row["seconds"] > CLIFF * seconds for seconds in larger)
    return rows


def step(runtime: Runtime, batch: int, steps: int, peak: PeakRates) -> dict[str, float]:
    """A decode step's median, in seconds; the timed steps are near the end of a chunk."""
    cache, first = runtime.new_cache(batch), max(runtime.config.chunk_size - 2 * steps, 0)
    fill(cache, first)
    programs, tokens = runtime.bind(cache), random_tokens(runtime, batch, 1)[:, 0].to(runtime.device)
    seconds = median_seconds(lambda: programs.step(tokens), runtime.device, steps)
    visible = visible_tokens(runtime.config, first, steps) / steps
    floor = decode_bytes(runtime.config, runtime.dtype, batch, visible).total / peak.copy
    return {"seconds": seconds, "floor_seconds": floor, "share": floor / seconds}


def tables(found: dict[str, Any]) -> dict[str, dict[int, dict[str, Any]]]:
    """Rows by preset and format, then by batch."""
    lines: dict[str, dict[int, dict[str, Any]]] = {}
    for row in found["results"]:
        lines.setdefault(f"{row['preset']} {row['format']}", {})[row["batch"]] = row
    return lines


def markdown(found: dict[str, Any]) -> str:
    """Milliseconds and shares, a line for each preset and format; a cliff is in bold."""
    batches = sorted({row["batch"] for row in found["results"]})
    head = f"{found['machine']}, {found['dtype']}, runtime {found['runtime']}, copy "
    lines = [f"`{found['command']}`", "", head + f"{found['copy_gigabytes_per_second']:,.0f} GB/s", ""]
    lines += ["| ms a step (share of the roofline) | " + " | ".join(map(str, batches)) + " |"]
    lines += ["|---|" + "---|" * len(batches)]
    for name, rows in tables(found).items():
        lines.append(f"| {name} | " + " | ".join(_cell(rows.get(batch)) for batch in batches) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None or "seconds" not in row:
        return "" if row is None else row["error"]
    text = f"{row['seconds'] * 1e3:.3g} ({row['share']:.0%})"
    return f"**{text}**" if row["cliff"] else text


def draw(found: dict[str, Any], path: Path) -> None:
    """The shares as a heat map, with a frame around each cliff; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed; pip install 'megalodon-export[bench]'", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines, batches = tables(found), sorted({row["batch"] for row in found["results"]})
    shares = [[rows.get(batch, {}).get("share", float("nan")) for batch in batches] for rows in lines.values()]
    figure, axis = pyplot.subplots(figsize=(1.5 + 0.6 * len(batches), 1.2 + 0.45 * len(lines)))
    image = axis.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axis.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axis.set_yticks(range(len(lines)), list(lines))
    axis.set_xlabel("batch")
    axis.set_title(f"share of the roofline, {found['machine']}", fontsize=9)
    for y, rows in enumerate(lines.values()):
        for x, batch in enumerate(batches):
            row = rows.get(batch, {})
            if "seconds" in row:
                axis.text(x, y, f"{row['share']:.0%}", ha="center", va="center", fontsize=7, color="white")
            if row.get("cliff"):
                axis.add_patch(pyplot.Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, fill=False, edgecolor="red", lw=2))
    figure.colorbar(image, ax=axis)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
