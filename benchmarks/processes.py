"""Two measurements of `speed.py`: the memory of a new process, and a CUDA graph beside plain launches.

python benchmarks/processes.py BUNDLE DEVICE     prints the memory that both programs add to this process
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from megalodon_export.bundles import bundle
from megalodon_export.generation.snapshot import state_size
from megalodon_export.measure.bench import median_seconds
from megalodon_export.runtimes import Runtime, open_runtime


def memory_of_a_process(folder: Path, device: str) -> dict[str, int]:
    """Bytes that a new process needs to load both programs and to run each once, on the host and on a GPU.

    `resident` minus `private` are pages of the weight files. All processes that open the bundle share them.
    """
    command = [sys.executable, __file__, str(folder), device]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return measured


def resident_memory() -> dict[str, int]:
    """Bytes of this process in memory: `resident` counts all pages, `private` those that are not pages of files."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return {"resident": sizes["Rss"], "private": sizes["Anonymous"]}


def added_memory(folder: Path, device: str) -> dict[str, int]:
    """Load both programs, run each once, and return how many bytes this process has grown by."""
    manifest = bundle.read(folder, check="sizes")
    torch.zeros(1, device=device)
    before = resident_memory()
    runtime = open_runtime("aoti", folder, manifest, device)
    programs = runtime.bind(runtime.new_cache(1), capture=False)
    ids = torch.randint(runtime.config.vocab_size, (1, 64), device=runtime.device)
    programs.prefill(ids, torch.tensor([64]))
    programs.decode(ids[:, 0])
    after = resident_memory()
    added = {name: after[name] - before[name] for name in after}
    weights = sum((folder / name).stat().st_size for name in (manifest.weights, manifest.derived_constants))
    added |= {"weight_files": weights, "cache": state_size(runtime.config, runtime.dtype)}
    if runtime.device.type == "cuda":
        added["gpu"] = torch.cuda.max_memory_allocated()
    return added


def graph_against_none(runtime: Runtime, steps: int) -> dict[str, Any]:
    """Greedy decode with a CUDA graph and without: whether the tokens are equal, GPU memory grown, times of a step."""
    first = torch.tensor([7], device=runtime.device)

    def run(step: Any) -> torch.Tensor:
        token, tokens = first, []
        for _ in range(steps):
            token = step(token).argmax(-1)
            tokens.append(token)
        return torch.cat(tokens)

    plain, graphed = (runtime.bind(runtime.new_cache(1), capture) for capture in (False, True))
    expected = run(plain.decode)
    graphed.decode(first)
    graphed.cache.reset()
    before = torch.cuda.memory_allocated()
    found = run(graphed.decode)
    grown = torch.cuda.memory_allocated() - before - found.nbytes
    return {
        "steps": steps,
        "equal_tokens": bool(torch.equal(expected, found)),
        "gpu_bytes_grown": grown,
        "graph_ms": median_seconds(lambda: graphed.step(first), runtime.device, 200) * 1e3,
        "no_graph_ms": median_seconds(lambda: plain.step(first), runtime.device, 50) * 1e3,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="print the memory that a bundle's programs add to this process")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("device")
    args = parser.parse_args()
    print(json.dumps(added_memory(args.bundle, args.device)))
