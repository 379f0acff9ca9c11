"""Reports of the benchmarks: the fields that each begins with, and speed.json as Markdown tables and plots.

python benchmarks/report.py DIR     writes DIR/speed.md again, and the plots, from DIR/speed.json
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from megalodon_export.export.versions import versions
from megalodon_export.measure.bench import machine

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], Any]]


def head(device: str) -> Row:
    """The fields that every report begins with: command, date, machine, threads and versions."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(torch.device(device)),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def markdown(found: dict[str, Any]) -> str:
    """The contents of speed.json as Markdown, one table for each kind of measurement."""
    config = found["config"]
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "cuda") if name in found["versions"])
    lines = [
        f"# {found['model']}, {_numbers(found)}, {found['machine']}",
        "",
        f"`{found['command']}`",
        "",
        f"{found['date']}; {versions}; {found['threads']} threads on the host; "
        f"{config.get('num_layers', 12)} layers, D {config.get('model_dim', 1024)}. Peak rates of this run: "
        f"copy {found['copy_gigabytes_per_second']:,.1f} GB/s, matmul {found['matmul_teraflops']:,.3g} TFLOP/s. "
        "Times are medians. The roofline's share is the time that it allows over the measured time.",
    ]
    results = found["results"]
    lines += _table("Prefill", [r for r in results if "prefill_seconds" in r], _PREFILL)
    lines += _table("Decode (streams near the end of a chunk)", [r for r in results if "decode_seconds" in r], _DECODE)
    lines += _table("Contexts, batch 1, streamed", [r for r in found["contexts"] if "error" not in r], _CONTEXTS)
    for row in found.get("kernels", []):
        lines += _kernels(row)
    lines += _table("Not measured", [r for r in results + found["contexts"] if "error" in r], _ERRORS)
    for name in ("export_seconds", "compile_seconds", "process_memory", "cuda_graph"):
        if name in found:
            lines += ["", f"{name}: `{found[name]}`"]
    return "\n".join(lines) + "\n"


def write(found: dict[str, Any], out: Path) -> None:
    """Write speed.md and, with matplotlib, the plots into a folder."""
    (out / "speed.md").write_text(markdown(found))
    plots(found, out)


def _numbers(found: dict[str, Any]) -> str:
    weights = found.get("weight_format", "float")
    return found["dtype"] if weights == "float" else f"{found['dtype']} with {weights} weights"


def plots(found: dict[str, Any], out: Path) -> None:
    """Write context.png (rates and memory against the context) and batch.png (share of the roofline by batch)."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed; pip install 'megalodon-export[bench]'", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    title = f"{found['model']}, {_numbers(found)}, {found['machine']}"
    contexts = [r for r in found["contexts"] if "error" not in r and not r.get("fresh_streams")]
    if contexts:
        figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.5))
        for axis, key, label, scale in (
            (axes[0], "prefill_tokens_per_second", "prefill, tokens/s", 1),
            (axes[1], "decode_tokens_per_second", "decode, tokens/s", 1),
            (axes[2], "memory_bytes", "memory, GB", 1e9),
        ):
            _lines(axis, contexts, "context_tokens", key, scale)
            axis.set(xlabel="context, tokens", ylabel=label)
        _save(pyplot, figure, title, out / "context.png")
    decoded = [r for r in found["results"] if "decode_share" in r]
    if decoded:
        figure, axis = pyplot.subplots(figsize=(6, 4.5))
        _lines(axis, decoded, "batch", "decode_share", 0.01)
        axis.set(xlabel="batch", ylabel="decode, % of the roofline")
        _save(pyplot, figure, title, out / "batch.png")


def _lines(axis: Any, rows: list[Row], x: str, y: str, scale: float) -> None:
    rows = [row for row in rows if y in row]
    for name in dict.fromkeys(row["runtime"] for row in rows):
        points = [(row[x], row[y] / scale) for row in rows if row["runtime"] == name]
        axis.plot(*zip(*points, strict=True), marker="o", label=name)
    places = sorted({row[x] for row in rows})
    axis.set_xscale("log")
    axis.set_xticks(places, [f"{place:,}" for place in places])
    axis.minorticks_off()
    axis.set_ylim(0, 1.1 * max(row[y] / scale for row in rows))
    axis.grid(alpha=0.3)
    axis.legend()


def _save(pyplot: Any, figure: Any, title: str, path: Path) -> None:
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _number(key: str, form: str, scale: float = 1.0) -> Callable[[Row], str]:
    return lambda row: format(row[key] / scale, form) if key in row else "-"


def _table(title: str, rows: list[Row], columns: Iterable[Column]) -> list[str]:
    if not rows:
        return []
    columns = list(columns)
    header = "| " + " | ".join(name for name, _ in columns) + " |"
    body = ["| " + " | ".join(str(value(row)) for _, value in columns) + " |" for row in rows]
    return ["", f"## {title}", "", header, "|" + "---|" * len(columns), *body]


_LISTED_KERNELS = 16


def _kernels(row: Row) -> list[str]:
    """The kernels of one pass that take the most time, and the share of each group of kernels."""
    where = f"{row['tokens']:,} tokens" if "tokens" in row else f"at {row['position']:,}"
    title = f"Kernels of a {row['pass']} ({row['runtime']}, batch {row['batch']}, {where})"
    shares = ", ".join(f"{group} {share:.1%}" for group, share in row["shares"].items())
    columns: list[Column] = [
        ("kernel", lambda k: f"`{k['name'].split('(')[0][:60]}`"),
        ("launches", _number("launches", ".0f")),
        ("us", _number("microseconds", ",.1f")),
    ]
    table = _table(title, row["kernels"][:_LISTED_KERNELS], columns)
    return [*table[:2], "", f"{row['microseconds']:,.0f} us on the device: {shares}.", *table[2:]]


_HEAD: list[Column] = [("runtime", lambda r: r["runtime"]), ("batch", lambda r: r.get("batch", "-"))]
_MEMORY: list[Column] = [("memory GB", _number("memory_bytes", ".2f", 1e9))]
_PREFILL: list[Column] = [
    *_HEAD,
    ("tokens", lambda r: r["prompt_tokens"]),
    ("load s", _number("load_seconds", ".2f")),
    ("prefill ms", _number("prefill_seconds", ",.2f", 1e-3)),
    ("tokens/s", _number("prefill_tokens_per_second", ",.0f")),
    ("TFLOP/s", _number("prefill_teraflops", ",.3g")),
    ("of roofline", _number("prefill_share", ".1%")),
    ("first token ms", _number("first_token_seconds", ",.2f", 1e-3)),
    *_MEMORY,
]
_DECODE: list[Column] = [
    *_HEAD,
    ("load s", _number("load_seconds", ".2f")),
    ("decode ms", _number("decode_seconds", ",.3f", 1e-3)),
    ("tokens/s", _number("decode_tokens_per_second", ",.0f")),
    ("GB/s", _number("decode_gigabytes_per_second", ",.1f")),
    ("of roofline", _number("decode_share", ".1%")),
    ("generate ms", _number("generate_seconds", ",.3f", 1e-3)),
    *_MEMORY,
]
_CONTEXTS: list[Column] = [
    ("runtime", lambda r: r["runtime"]),
    ("context", lambda r: f"{r['context_tokens']:,}" + (" each, fresh" if r.get("fresh_streams") else "")),
    ("prefill tokens/s", _number("prefill_tokens_per_second", ",.0f")),
    ("of roofline", _number("prefill_share", ".1%")),
    ("decode ms", _number("decode_seconds", ",.3f", 1e-3)),
    ("of roofline", _number("decode_share", ".1%")),
    *_MEMORY,
]
_ERRORS: list[Column] = [
    *_HEAD,
    ("tokens", lambda r: r.get("prompt_tokens", "-")),
    ("why", lambda r: r["error"]),
]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="write speed.md and the plots from a speed.json")
    parser.add_argument("folder", type=Path, help="the folder that holds speed.json")
    folder = parser.parse_args().folder
    write(json.loads((folder / "speed.json").read_text()), folder)
