"""Measure bits per byte of the default checkpoint's held-out text, for every dtype and weight format.

    python benchmarks/quality.py --text kjv.txt --out benchmarks/results/quality-default.json

`artifacts/recipe/README.md` says how to get the text. The measure is the recipe's: all held-out bytes are one stream in
eager mode, with the state carried from the first byte to the last. The perplexity is that of a byte, 2 to the power of
the bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from report import head

from megalodon_export.bundles.checkpoints import default_checkpoint, load_model
from megalodon_export.bundles.manifest import DTYPES
from megalodon_export.measure.roofline import weight_bytes
from megalodon_export.model import quantize
from megalodon_export.model.config import QUANTIZED_FORMATS

sys.path.append(str(Path(__file__).parent.parent / "artifacts" / "recipe"))
import corpus
from checkpoint import bits_per_byte


def main() -> None:
    """Measure every dtype and format; write and print the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="the corpus of artifacts/recipe")
    parser.add_argument("--checkpoint", type=Path, default=default_checkpoint())
    parser.add_argument("--group-size", type=int, nargs="+", default=[32, 16], help="int4's groups")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    args = parser.parse_args()
    text = args.text.read_bytes()
    stream = torch.tensor(corpus.token_ids(corpus.split(text).held_out), device=args.device)
    found: dict[str, Any] = {
        **head(args.device),
        "text_sha256": hashlib.sha256(text).hexdigest(),
        "tokens": len(stream),
        "results": [],
    }
    for dtype in ("float32", "bfloat16"):
        for weight_format, group_size in [("float", None), *formats(args.group_size)]:
            row = measure(args.checkpoint, dtype, weight_format, group_size, stream)
            found["results"].append(row)
            args.out.write_text(json.dumps(found, indent=2) + "\n")
            print(json.dumps(row), flush=True)


def formats(group_sizes: list[int]) -> list[tuple[str, int | None]]:
    """The quantised formats with their group sizes: int8 once, int4 once for each size."""
    return [(name, size) for name in QUANTIZED_FORMATS for size in (group_sizes if name == "int4" else [None])]


def measure(
    checkpoint: Path, dtype: str, weight_format: str, group_size: int | None, stream: torch.Tensor
) -> dict[str, Any]:
    """One row: bits per byte, perplexity of a byte, and the bytes of weights that a decode step reads."""
    model = load_model(checkpoint, DTYPES[dtype], stream.device)
    if weight_format != "float":
        quantize(model, weight_format, group_size)  # type: ignore[arg-type]
    bits, count = bits_per_byte(model, stream)
    return {
        "dtype": dtype,
        "weight_format": weight_format,
        "group_size": group_size,
        "bits_per_byte": bits,
        "perplexity": 2**bits,
        "held_out_bytes": count,
        "decode_weight_bytes": weight_bytes(model.config, DTYPES[dtype]),
    }


if __name__ == "__main__":
    main()
