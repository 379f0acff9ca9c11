"""How many CPU threads a command uses."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

_SMALL_WEIGHTS = 32 << 20  # bytes


def set_threads(args: argparse.Namespace, folder: Path) -> None:
    """Use as many threads as `--threads` says; by default one for a small model, else torch's own choice.

    A small model is slower on many threads, which wait for each other longer than they work.
    """
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    elif weights < _SMALL_WEIGHTS:
        torch.set_num_threads(1)
