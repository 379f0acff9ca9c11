"""Checkpoints in transformers' layout: the default one, loading, and what a bundle copies from one."""

from __future__ import annotations

from pathlib import Path

import torch

from ..model import MegalodonForCausalLM, check_dtype
from .manifest import DTYPES, WEIGHTS

__all__ = ["COMPANIONS", "DTYPES", "TOKENIZER", "WEIGHTS", "CheckpointError", "default_checkpoint", "load_model"]

TOKENIZER = "tokenizer.json"
# What transformers reads beside the weights; a bundle carries them along.
COMPANIONS = (
    *("generation_config.json", TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"),
    "chat_template.jinja",
)


class CheckpointError(Exception):
    """A folder is not a checkpoint that this package can load."""


def default_checkpoint() -> Path:
    """The small trained model that ships with the package."""
    package = Path(__file__).parents[1]
    for folder in (package / "default_checkpoint", package.parent / "artifacts" / "default"):  # wheel, clone
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError("the default checkpoint is not installed; reinstall the package, or pass --checkpoint DIR")


def load_model(
    folder: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> MegalodonForCausalLM:
    """A checkpoint for inference, in `dtype` (default: as stored); CheckpointError if it is none of ours."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is no checkpoint: it has no config.json")
    if not (folder / WEIGHTS).is_file() and not list(folder.glob("*.safetensors")):
        hint = "; convert it first: megalodon-export convert --help" if list(folder.glob("*.pth")) else ""
        raise CheckpointError(f"{folder} is no checkpoint: it has no {WEIGHTS}{hint}")
    try:
        model = MegalodonForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    check_dtype(model.dtype_of_weights)
    return model.eval().requires_grad_(False).to(device)
