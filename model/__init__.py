"""The Megalodon model.

The names below are imported when they are first used: those of transformers' classes import transformers, and the rest
needs PyTorch alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import CacheTensor, ModelCache, cache_layout, dimension_sizes
    from .config import PRESETS, ModelConfig
    from .constants import freeze_constants, unfreeze_constants
    from .distributed.sequence_parallel import parallel_logits, parallel_loss, sum_gradients
    from .kernels import use_kernels
    from .modeling import Megalodon, MegalodonLM, check_dtype
    from .quantized import QuantizedLinear
    from .transformers_api.cache import MegalodonCache
    from .transformers_api.config import MegalodonConfig, preset
    from .transformers_api.modeling import MegalodonForCausalLM, MegalodonModel
    from .transformers_api.quantization import quantize

_MODULES = {
    "cache": ("CacheTensor", "ModelCache", "cache_layout", "dimension_sizes"),
    "config": ("PRESETS", "ModelConfig"),
    "constants": ("freeze_constants", "unfreeze_constants"),
    "distributed.sequence_parallel": ("parallel_logits", "parallel_loss", "sum_gradients"),
    "kernels": ("use_kernels",),
    "modeling": ("Megalodon", "MegalodonLM", "check_dtype"),
    "quantized": ("QuantizedLinear",),
    "transformers_api.cache": ("MegalodonCache",),
    "transformers_api.config": ("MegalodonConfig", "preset"),
    "transformers_api.modeling": ("MegalodonForCausalLM", "MegalodonModel"),
    "transformers_api.quantization": ("quantize",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "PRESETS",
    "CacheTensor",
    "Megalodon",
    "MegalodonCache",
    "MegalodonConfig",
    "MegalodonForCausalLM",
    "MegalodonLM",
    "MegalodonModel",
    "ModelCache",
    "ModelConfig",
    "QuantizedLinear",
    "cache_layout",
    "check_dtype",
    "dimension_sizes",
    "freeze_constants",
    "parallel_logits",
    "parallel_loss",
    "preset",
    "quantize",
    "sum_gradients",
    "unfreeze_constants",
    "use_kernels",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
