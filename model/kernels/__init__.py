"""The model on a GPU: Triton kernels behind torch operators, which torch.export traces and AOTInductor compiles.

    decode/             one decode step, per operation: reference, kernels, launch
    prefill/            new tokens of every row, likewise
    backend.py          both as a back end of the model
    launch.py           how kernels are launched; programmatic dependent launch
    layer_norm.py, timestep_norm.py, rotary.py, elementwise.py      what both folders use

The plain form in `model/` stays the reference, the form for training, and the one for every other device.
`use_kernels` switches a model from one to the other.
"""

from __future__ import annotations

import torch
from torch import nn

from ..backend import Backend
from ..quantized import QuantizedLinear

KERNEL_PREFIX = "megalodon_"  # of every kernel's name: in a captured CUDA graph it marks kernels that call PDL's wait
PDL_CONSTEXPR = "PDL"  # the kernels' constant that switches programmatic dependent launch on
MAX_EARLY_BATCH = 4  # rows of a batch up to which attention's grid leaves room for kernels that launch early


def use_kernels(model: nn.Module, enabled: bool = True) -> None:
    """Run a model's inference on these kernels, or in its plain form again. They need a CUDA GPU and Triton.

    Passes without a cache, and training, keep the plain form. Raises ImportError without Triton. Raises TypeError for a
    model that is not in float32 or bfloat16 (beside int8 and int4 weights), whose int4 groups are no power of two, that
    attends beyond its chunks, or whose layers have adapters.
    """
    backend = Backend()
    if enabled:
        _check(model)
        from .backend import KernelBackend  # needs Triton

        backend = KernelBackend()
    for module in model.modules():
        if isinstance(getattr(module, "backend", None), Backend):
            setattr(module, "backend", backend)  # noqa: B010 - nn.Module types its attributes as tensors and modules


def _check(model: nn.Module) -> None:
    if any(getattr(module, "window", None) is not None for module in model.modules()):
        raise TypeError("the kernels attend inside chunks; leave max_cache_len and cache_unbounded out")
    if any(hasattr(module, "base_layer") for module in model.modules()):  # as PEFT's LoRA keeps the layer it changes
        raise TypeError(
            "the kernels read the weights of linear layers, not adapters; merge them first: merge_and_unload()"
        )
    packed = [m for m in model.modules() if isinstance(m, QuantizedLinear) and m.weight.dtype == torch.uint8]
    for group in {layer.in_features // layer.scale.shape[1] for layer in packed}:
        if group & (group - 1):
            raise TypeError(f"the kernels read int4 in groups of a power of two, not of {group}; use the plain form")
    wrong = {p.dtype for p in model.parameters()} - {torch.float32, torch.bfloat16}
    if wrong:
        raise TypeError(f"the kernels compute in float32 and bfloat16, not in {wrong.pop()}; use the plain form")
