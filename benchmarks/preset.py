"""A preset with random weights, exported and measured on this machine: time, size, memory, speed beside the floor.

    python benchmarks/preset.py --preset 200M --out results.json                   # this machine's best device
    python benchmarks/preset.py --preset 200M --device cuda --graph-steps 10000    # and: CUDA graph against none

Prints the report as JSON; progress goes to stderr. Needs disk for one copy of the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from megalodon_export import bundle
from megalodon_export.bench import bench, median_seconds
from megalodon_export.checkpoints import DTYPES
from megalodon_export.export import default_device, export_aoti
from megalodon_export.model import MegalodonForCausalLM, preset
from megalodon_export.runtimes import open_runtime
from megalodon_export.snapshot import state_size


def main() -> None:
    """Export, then measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="200M")
    parser.add_argument("--layers", type=int, help="another number of layers than the preset's")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--dtype", choices=tuple(DTYPES))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=100, help="decode steps that are timed")
    parser.add_argument("--graph-steps", type=int, default=0, help="CUDA: greedy steps with and without a graph")
    parser.add_argument("--folder", type=Path, help="keep the bundle here (and reuse one that is there)")
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    args = parser.parse_args()
    dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch) / "bundle"
        report: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "preset": args.preset}
        if not bundle.is_bundle(folder):
            report["export_seconds"] = make_bundle(args, dtype, folder, Path(scratch) / "checkpoint")
        manifest = bundle.read(folder, check="sizes")
        report["file_bytes"] = {name: entry["size"] for name, entry in manifest["files"].items()}
        report["memory"] = memory_of_a_process(folder, args.device)
        report |= bench(folder, ["aoti"], args.batch, args.prompt_tokens, args.steps)
        if args.graph_steps and args.device.startswith("cuda"):
            report["cuda_graph"] = graph_against_none(folder, args.graph_steps)
    text = json.dumps(report, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


def make_bundle(args: argparse.Namespace, dtype: str, folder: Path, checkpoint: Path) -> float:
    """Save random weights, export them; seconds that the export took."""
    overrides = {"num_layers": args.layers} if args.layers else {}
    torch.manual_seed(0)
    model = MegalodonForCausalLM(preset(args.preset, **overrides)).to(DTYPES[dtype])
    model.save_pretrained(checkpoint)
    del model
    started = time.monotonic()
    export_aoti(checkpoint, folder, args.device, dtype)
    return time.monotonic() - started


def memory_of_a_process(folder: Path, device: str) -> dict[str, int]:
    """Bytes that loading both programs and running each once adds to a fresh process, on the host and on a GPU.

    `mapped` are pages of the weight files, shared by every process that opens the bundle; `private` is the rest.
    """
    command = [sys.executable, __file__, "--measure-memory", str(folder), device]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
    measured: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return measured


def measure_memory(folder: Path, device: str) -> None:
    """In the fresh process: print what loading and running adds."""

    def resident() -> dict[str, int]:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        return {"resident": sizes["Rss"], "private": sizes["Anonymous"]}

    manifest = bundle.read(folder, check="sizes")
    torch.zeros(1, device=device)
    before = resident()
    runtime = open_runtime("aoti", folder, manifest, device)
    cache = runtime.new_cache(1)
    ids = torch.randint(runtime.config.vocab_size, (1, 64), device=runtime.device)
    runtime.prefill(ids, torch.tensor([64]), cache)
    runtime.decode(ids[:, 0], cache)
    after = resident()
    added = {name: after[name] - before[name] for name in after}
    weights = sum((folder / manifest[key]).stat().st_size for key in ("weights", "derived_constants"))
    report = {**added, "weight_files": weights, "cache": state_size(runtime.config, runtime.dtype)}
    if runtime.device.type == "cuda":
        report["gpu"] = torch.cuda.max_memory_allocated()
    print(json.dumps(report))


def graph_against_none(folder: Path, steps: int) -> dict[str, Any]:
    """Greedy decode with a CUDA graph and without: equal tokens, GPU memory before and after, milliseconds a step."""
    runtime = open_runtime("aoti", folder, bundle.read(folder, check="sizes"))
    first = torch.tensor([7], device=runtime.device)

    def run(step: Any) -> torch.Tensor:
        token, tokens = first, []
        for _ in range(steps):
            token = step(token).argmax(-1)
            tokens.append(token)
        return torch.cat(tokens)

    plain, graphed = runtime.new_cache(1), runtime.new_cache(1)
    expected = run(lambda token: runtime.decode(token, plain))
    replay = runtime.decoder(graphed)
    replay(first)
    graphed.copy_(runtime.new_cache(1))
    before = torch.cuda.memory_allocated()
    found = run(replay)
    grown = torch.cuda.memory_allocated() - before - found.nbytes
    return {
        "steps": steps,
        "equal_tokens": bool(torch.equal(expected, found)),
        "gpu_bytes_grown": grown,
        "graph_ms": median_seconds(lambda: replay(first), runtime.device, 200) * 1e3,
        "no_graph_ms": median_seconds(lambda: runtime.decode(first, plain), runtime.device, 50) * 1e3,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure-memory"]:
        measure_memory(Path(sys.argv[2]), sys.argv[3])
    else:
        main()
