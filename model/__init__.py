"""What a Megalodon model computes. Importing this registers it with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache import CacheTensor, MegalodonCache, cache_layout, dimension_sizes
from .config import PRESETS, MegalodonConfig, preset
from .constants import freeze_constants, unfreeze_constants
from .distributed.sequence_parallel import parallel_logits, parallel_loss, sum_gradients
from .kernels import use_kernels
from .modeling import MegalodonForCausalLM, MegalodonModel, check_dtype
from .quantized import QuantizedLinear, quantize

AutoConfig.register("megalodon", MegalodonConfig, exist_ok=True)
AutoModel.register(MegalodonConfig, MegalodonModel, exist_ok=True)
AutoModelForCausalLM.register(MegalodonConfig, MegalodonForCausalLM, exist_ok=True)

__all__ = [
    "PRESETS",
    "CacheTensor",
    "MegalodonCache",
    "MegalodonConfig",
    "MegalodonForCausalLM",
    "MegalodonModel",
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
