"""Convert checkpoints that megalodon-hf's own code wrote, over all its options, and compare the logits.

    python tests/soak/megalodon_hf.py PYTHON                # PYTHON has megalodon-hf and transformers 4 installed
    python tests/soak/megalodon_hf.py PYTHON --no-defaults  # without the 200M model of its default config

A case is a config and the arguments of `save_pretrained`. Its weights share the embedding with the head, so that it
can write pickles alone. Compared are the logits of a prompt of several chunks, with and without a cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from megalodon_export.model.conversion import convert_megalodon_hf

BOUND = 1e-4
SMALL: dict[str, Any] = {
    **{"vocab_size": 61, "model_dim": 48, "num_layers": 3, "num_heads": 2, "z_dim": 16, "value_dim": 32},
    **{"ffn_hidden_dim": 64, "cema_ndim": 4, "chunk_size": 16, "norm_num_groups": 4},
}
PICKLE = {"safe_serialization": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "small": {},
    "one head": {"num_heads": 1},
    "four heads": {"num_heads": 4},
    "swiglu": {"swiglu": True},
    "rescale_nffn": {"rescale_nffn": True},
    "swiglu and rescale_nffn": {"swiglu": True, "rescale_nffn": True},
    "scale_emb": {"scale_emb": True},
    "share_emb": {"share_emb": True},
    "no affine": {"norm_affine": False},
    "norm_eps": {"norm_eps": 1e-3},
    "one group": {"norm_num_groups": 1},
    "a group for each channel": {"norm_num_groups": 48},
    "rope_base": {"rope_base": 1e5},
    "one mode": {"cema_ndim": 1},
    "chunks of 7": {"chunk_size": 7},
    "tied in spite of output_size": {"output_size": 29},
    "tied to a larger output_size": {"output_size": 90},
    "untied": {"output_size": 29, "tie_word_embeddings": False},
    "output_size is vocab_size": {"output_size": 61, "tie_word_embeddings": False},
    "max_cache_len": {"max_cache_len": 40},
    "cache_unbounded": {"cache_unbounded": True},
    "init bert": {"init_mode": "bert", "dropout": 0.1, "attention_dropout": 0.1, "hidden_dropout": 0.1},
    "init none": {"init_mode": "none", "max_positions": 4096, "gradient_checkpointing": True},
    "other tokens": {"bos_token_id": 5, "eos_token_id": 6, "pad_token_id": 7},
    "all at once": {
        **{"swiglu": True, "rescale_nffn": True, "scale_emb": True, "norm_eps": 1e-4, "rope_base": 5e4},
        **{"num_heads": 4, "output_size": 29, "init_mode": "xavier", "norm_num_groups": 8, "max_cache_len": 32},
    },
}


def cases(with_defaults: bool) -> dict[str, dict[str, Any]]:
    """Every case by its name: 25 options, two other ways to save, and the defaults."""

    def case(config: dict[str, Any], save: dict[str, Any] = PICKLE, dtype: str = "float32") -> dict[str, Any]:
        return {"config": config, "save": save, "dtype": dtype, "length": 53}

    made = {name: case({**SMALL, **config}) for name, config in OPTIONS.items()}
    made["shards"] = case(SMALL, {**PICKLE, "max_shard_size": "40KB"})
    made["bfloat16"] = case({**SMALL, "swiglu": True}, dtype="bfloat16")
    if with_defaults:
        made["defaults"] = case({})
    return made


def difference(source: Path, converted: Path) -> tuple[float, float]:
    """The largest difference of a logit between the two, and the largest logit."""
    convert_megalodon_hf(source, converted)
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32).eval()
    stored = torch.load(source / "logits.pt", weights_only=True)
    found, largest = 0.0, 0.0
    for cached in (False, True):
        with torch.no_grad():
            logits = model(stored["token_ids"], use_cache=cached).logits
        if logits.shape != stored[str(cached)].shape:
            raise ValueError(f"{converted}: logits {tuple(logits.shape)}, expected {tuple(stored[str(cached)].shape)}")
        found = max(found, (logits - stored[str(cached)]).abs().max().item())
        largest = max(largest, logits.abs().max().item())
    return found, largest


def main() -> int:
    """Write, convert and compare all cases; 1 if one is out of bounds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("python", help="an interpreter that has megalodon-hf and transformers 4")
    parser.add_argument("--no-defaults", action="store_true", help="leave out the 200M model of the default config")
    parser.add_argument("--case", action="append", help="this case alone; may be repeated")
    args = parser.parse_args()
    wanted = {name: case for name, case in cases(not args.no_defaults).items() if name in (args.case or [name])}
    worst = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        writer = [args.python, str(Path(__file__).with_name("write_megalodon_hf.py")), str(root / "written")]
        subprocess.run(writer, input=json.dumps(wanted), text=True, check=True)
        for name in wanted:
            found, largest = difference(root / "written" / name, root / "converted" / name)
            files = sorted(path.name for path in (root / "written" / name).glob("*.bin*"))
            print(f"{name:<32}{found:>10.1e} of {largest:>5.1f}   {', '.join(files)}", flush=True)
            worst = max(worst, found)
    print(f"{len(wanted)} checkpoints, largest difference {worst:.1e}, allowed {BOUND:.0e}")
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
