"""The model as PyTorch runs it, from the bundle's own checkpoint files: the reference for every other runtime."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..bundles.checkpoints import load_model
from ..bundles.manifest import Manifest
from ..exporters.programs import Limits
from ..model import MegalodonCache, MegalodonForCausalLM, freeze_constants
from .base import Runtime


class ModelRuntime(Runtime):
    """Runs the modules of a model in memory; freezes what it derives from its weights."""

    def __init__(self, model: MegalodonForCausalLM, limits: Limits | None = None, all_logits: bool = False) -> None:
        self.model = model
        freeze_constants(model)
        limits = limits or Limits.of(model.config, max_batch=2**16)
        super().__init__(model.config, model.dtype_of_weights, model.device, limits, all_logits)
        # A horizon beyond the chunk reads positions on the host, which no captured graph can.
        self.capturable = model.config.attention_window is None

    @torch.no_grad()
    def run_prefill(self, token_ids: Tensor, lengths: Tensor, cache: MegalodonCache) -> Tensor:
        """`MegalodonForCausalLM.prefill`."""
        run = self.model.score if self.all_logits else self.model.prefill
        return run(token_ids, lengths, cache)

    @torch.no_grad()
    def run_decode(self, token_ids: Tensor, cache: MegalodonCache) -> Tensor:
        """`MegalodonForCausalLM.decode`."""
        return self.model.decode(token_ids, cache)


class EagerRuntime(ModelRuntime):
    """Runs the modules on a bundle's weights; float16 ones in float32."""

    def __init__(self, folder: Path, manifest: Manifest, device: str | None = None) -> None:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = manifest.torch_dtype
        super().__init__(load_model(folder, torch.float32 if dtype == torch.float16 else dtype, chosen))
