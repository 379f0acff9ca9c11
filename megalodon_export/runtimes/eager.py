"""The model as PyTorch runs it, from the bundle's own checkpoint files: the reference for every other runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..bundles.checkpoints import default_device
from ..bundles.manifest import Manifest
from ..exporters.programs import Limits
from ..exporters.weight_files import TIED_NAMES
from ..model.cache import ModelCache
from ..model.config import ModelConfig
from ..model.constants import freeze_constants
from ..model.modeling import MegalodonLM
from .ambient import in_plain_modes
from .base import Runtime, require_device
from .bound_programs import BoundPrograms


class ModelRuntime(Runtime):
    """Runs the modules of a model in memory; freezes what it derives from its weights."""

    @in_plain_modes
    def __init__(self, model: MegalodonLM, limits: Limits | None = None, model_id: str = "") -> None:
        """`model_id`: that of the bundle; a model without one is unlike any other, for its snapshots."""
        limits = limits or Limits.of(model.config, max_batch=2**16)
        device = model.model.embed.weight.device
        super().__init__(model.config, model.dtype_of_weights, device, limits, False, model_id or uuid4().hex)
        self.can_score = True
        self.model = model
        freeze_constants(model)

    def _bind(self, cache: ModelCache, capture: bool) -> BoundPrograms:
        # Attention beyond the chunk reads positions on the host, which a captured graph cannot.
        return BoundModelPrograms(self, cache, capture and self.config.attention_window is None)


class BoundModelPrograms(BoundPrograms):
    """`prefill`, `score` and `decode` of a model over one cache."""

    runtime: ModelRuntime

    @torch.no_grad()
    def run_prefill(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """Logits (B, V) of the last tokens."""
        return self.runtime.model.prefill(token_ids, lengths, self.cache)

    @torch.no_grad()
    def run_score(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """Logits (B, L, V) of all tokens."""
        return self.runtime.model.score(token_ids, lengths, self.cache)

    @torch.no_grad()
    def run_decode(self, token_ids: Tensor) -> Tensor:
        """Logits (B, V)."""
        return self.runtime.model.decode(token_ids, self.cache)


class EagerRuntime(ModelRuntime):
    """Runs the modules on a bundle's weights; float16 ones in float32."""

    def __init__(self, folder: Path, manifest: Manifest, device: str | None = None) -> None:
        chosen = torch.device(device or default_device())
        require_device(chosen)
        super().__init__(load_weights(manifest.config, folder / manifest.weights, chosen), model_id=manifest.model_id)


def load_weights(config: ModelConfig, path: Path, device: torch.device) -> MegalodonLM:
    """A model for inference on the tensors of a safetensors file, without transformers and without a copy.

    Tensors keep their dtype, except that float16 becomes float32, in which the model can run.
    """
    with torch.device("meta"), _NoInitialisation():
        model = MegalodonLM(config)
    tensors = {
        name: tensor.float() if tensor.dtype == torch.float16 else tensor
        for name, tensor in load_file(path, device=str(device)).items()
    }
    if config.head_is_embedding:
        tensors |= {name: tensors[other] for name, other in TIED_NAMES.items() if other in tensors}
    model.load_state_dict(tensors, assign=True)
    model.model.rotary.anchor = torch.zeros(0, dtype=model.dtype_of_weights, device=device)  # in no file
    return model.eval().requires_grad_(False)


class _NoInitialisation(TorchFunctionMode):
    """Leaves out `torch.nn.init`. On the meta device it would change nothing, and would import torch's compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
