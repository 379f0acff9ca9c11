"""Checkpoints in transformers' layout: the default one, loading, and what a bundle copies from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .. import model
from ..model.config import EMAForm
from .manifest import TOKENIZER, WEIGHTS, ModelDtype

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


def default_device() -> str:
    """This machine's best device: cuda where torch finds a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> ModelDtype:
    """The dtype that a checkpoint runs in unless told otherwise: bfloat16 on a GPU, float32 on a CPU."""
    return "bfloat16" if device.startswith("cuda") else "float32"


def load_model(
    folder: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ema_prefill: EMAForm | None = None,
) -> model.MegalodonForCausalLM:
    """A checkpoint for inference. By default `dtype` is that stored and `ema_prefill` the config's.

    CheckpointError if the folder is no checkpoint of ours.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is no checkpoint: it has no config.json")
    if not (folder / WEIGHTS).is_file() and not list(folder.glob("*.safetensors")):
        hint = "; convert it first: megalodon-export convert --help" if list(folder.glob("*.pth")) else ""
        raise CheckpointError(f"{folder} is no checkpoint: it has no {WEIGHTS}{hint}")
    try:
        form: dict[str, Any] = {} if ema_prefill is None else {"ema_prefill": ema_prefill}
        loaded = model.MegalodonForCausalLM.from_pretrained(folder, dtype=dtype or "auto", **form)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    model.check_dtype(loaded.dtype_of_weights)
    return loaded.eval().requires_grad_(False).to(device)
