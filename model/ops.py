"""The public name of the original's seven operations, which are in `compat/ops.py`."""

from .compat.ops import (
    attention,
    attention_softmax,
    ema_hidden,
    ema_parameters,
    fftconv,
    sequence_norm,
    timestep_norm,
)

__all__ = [
    "attention",
    "attention_softmax",
    "ema_hidden",
    "ema_parameters",
    "fftconv",
    "sequence_norm",
    "timestep_norm",
]
