"""Write checkpoints of megalodon-hf by its own code, and the logits that it computes from them.

    PYTHON tests/soak/write_megalodon_hf.py FOLDER < cases.json

PYTHON has megalodon-hf installed. It needs transformers 4, so that this is no process of this package's, and imports
nothing of it. `cases.json` is an object: a case's name -> {"config": ..., "save": ..., "dtype": ...}.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

megalodon_hf: Any = import_module("megalodon")


def write(folder: Path, case: dict[str, Any]) -> None:
    """One case: a model whose every parameter is random, saved, loaded again, and run."""
    torch.manual_seed(0)
    model = megalodon_hf.MegalodonForCausalLM(megalodon_hf.MegalodonConfig(**case["config"])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("embed.weight") or name == "lm_head.weight":
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            else:  # a matrix by a third of what it has from its initialisation
                columns = parameter.shape[1] if parameter.dim() == 2 and "gamma" not in name else 36
                parameter.add_(torch.randn_like(parameter) * 0.3 * columns**-0.5)
    model.to(getattr(torch, case["dtype"])).save_pretrained(folder, **case["save"])
    tied = {"config": model.config} if "tie_word_embeddings" in case["config"] else {}
    loaded = megalodon_hf.MegalodonForCausalLM.from_pretrained(folder, torch_dtype="float32", **tied).eval()
    token_ids = torch.randint(0, case["config"].get("vocab_size", 32_000), (2, case["length"]))
    with torch.no_grad():
        found = {str(cached): loaded(token_ids, use_cache=cached).logits for cached in (False, True)}
    torch.save({"token_ids": token_ids, **found}, folder / "logits.pt")


def main() -> None:
    """Write all cases."""
    root = Path(sys.argv[1])
    for name, case in json.load(sys.stdin).items():
        print(name, file=sys.stderr, flush=True)
        write(root / name, case)


if __name__ == "__main__":
    main()
