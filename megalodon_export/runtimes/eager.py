"""The model as PyTorch runs it, from the bundle's own checkpoint files: the reference for every other runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import DTYPES, load_model
from ..exporters.programs import Limits
from ..model import MegalodonCache, freeze_constants
from .base import Runtime


class EagerRuntime(Runtime):
    """Runs the modules themselves."""

    def __init__(self, folder: Path, manifest: dict[str, Any], device: str | None = None) -> None:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = DTYPES[manifest["dtype"]]
        self.model = load_model(folder, dtype, chosen)
        freeze_constants(self.model)
        super().__init__(self.model.config, dtype, chosen, Limits.of(self.model.config, max_batch=2**16), False)

    @torch.no_grad()
    def run_prefill(self, token_ids: Tensor, lengths: Tensor, cache: MegalodonCache) -> Tensor:
        """`MegalodonForCausalLM.prefill`."""
        return self.model.prefill(token_ids, lengths, cache, all_logits=self.all_logits)

    @torch.no_grad()
    def run_decode(self, token_ids: Tensor, cache: MegalodonCache) -> Tensor:
        """`MegalodonForCausalLM.decode`."""
        return self.model.decode(token_ids, cache)
