"""Test whether a decode step copies its cache: time steps for two capacities of the ring, beside one read of the ring.

    python benchmarks/cache_capacity.py

The script exports two models that differ in chunk_size alone. A step has to read the keys and values of every layer. A
step that copied them would write them as well, so its time would grow by more than the time of a read.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from megalodon_export.bundles import bundle
from megalodon_export.bundles.checkpoints import default_device
from megalodon_export.export.aoti import export_aoti
from megalodon_export.export.versions import versions
from megalodon_export.generation.snapshot import state_size
from megalodon_export.measure.bench import machine, median_seconds
from megalodon_export.model import MegalodonConfig, MegalodonForCausalLM
from megalodon_export.runtimes import open_runtime

SIZES = {"vocab_size": 512, "model_dim": 256, "num_layers": 2, "num_heads": 1, "z_dim": 128, "value_dim": 512}


def main() -> None:
    """Export a model for each capacity, time its decode step, print the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chunks", type=int, nargs="+", default=[1024, 16384], help="the chunk sizes, one model each")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default=default_device())
    args = parser.parse_args()
    rows = []
    for chunk in args.chunks:
        config = MegalodonConfig(**SIZES, ffn_hidden_dim=512, norm_num_groups=8, chunk_size=chunk)
        with tempfile.TemporaryDirectory() as scratch:
            torch.manual_seed(0)
            MegalodonForCausalLM(config).save_pretrained(f"{scratch}/checkpoint")
            folder = Path(scratch, "bundle")
            export_aoti(
                Path(scratch, "checkpoint"), folder, args.device, "float32", max_batch=args.batch, max_length=64
            )
            runtime = open_runtime("aoti", folder, bundle.read(folder, check="sizes"))
        cache = runtime.new_cache(args.batch)
        for tensor in cache.tensors()[:-1]:
            tensor.normal_().abs_()
        ids = torch.zeros(args.batch, dtype=torch.int64, device=runtime.device)
        programs = runtime.bind(cache, capture=False)
        step = median_seconds(lambda programs=programs, ids=ids: programs.step(ids), runtime.device, 30)
        rings = [ring for layer in cache.layers for ring in (layer.key, layer.value)]
        read = median_seconds(lambda rings=rings: [ring.sum() for ring in rings], runtime.device, 30)
        copy = median_seconds(lambda rings=rings: [ring.clone() for ring in rings], runtime.device, 30)
        size = args.batch * state_size(config, torch.float32)
        rows.append(
            {
                "chunk_size": chunk,
                "cache_bytes": size,
                "step_ms": step * 1e3,
                "read_ms": read * 1e3,
                "copy_ms": copy * 1e3,
            }
        )
    grown = {key: rows[-1][key] - rows[0][key] for key in ("step_ms", "read_ms", "copy_ms")}
    report = {"machine": machine(runtime.device), "threads": torch.get_num_threads(), "batch": args.batch}
    print(json.dumps({**report, "versions": versions(), "rows": rows, "grown": grown}, indent=1))


if __name__ == "__main__":
    main()
