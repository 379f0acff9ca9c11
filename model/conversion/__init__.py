"""Checkpoints of other implementations, converted to a folder that `AutoModelForCausalLM.from_pretrained` loads.

A layout says for each of our tensors which tensors of the source it is made of. One loader checks all of them before
anything is written.
"""

from .megalodon_hf import convert_megalodon_hf
from .reading import ConversionError
from .upstream import convert_upstream

__all__ = ["ConversionError", "convert_megalodon_hf", "convert_upstream"]
