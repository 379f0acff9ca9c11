"""Tensors that depend on the weights alone: derived at every call in training, held as buffers in inference.

model = model.eval(); freeze_constants(model)     # EMA coefficients and rotary tables are buffers now
model.train()                                     # and are derived from the parameters again
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from .precision import at_least_float32


class DerivedConstants(nn.Module):
    """A module with constants derived from its parameters or its sizes.

    `derive()` computes them, differentiably. `freeze_constants(model)` stores them as buffers of the submodule
    `frozen`, and `constants()` then returns those. An exported program holds them by name and never computes them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frozen: nn.Module | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As nn.Module._apply, which `to`, `half`, `cuda` and their like call.

        The constants, and the parameters from which they are derived, stay in float32 or better.
        """
        return super()._apply(partial(at_least_float32, fn), recurse)  # type: ignore[no-any-return, no-untyped-call]

    def derive(self) -> dict[str, Tensor]:
        """The constants, from the current parameters."""
        raise NotImplementedError

    def constants(self) -> dict[str, Tensor]:
        """The frozen constants if there are any, else freshly derived ones."""
        return dict(self.frozen.named_buffers()) if self.frozen is not None else self.derive()

    def freeze(self) -> None:
        """Hold the constants as buffers until `unfreeze`; later changes of the parameters are not seen."""
        with torch.no_grad():
            constants = self.derive()
        self.frozen = nn.Module()
        for name, tensor in constants.items():
            self.frozen.register_buffer(name, tensor.contiguous(), persistent=False)

    def unfreeze(self) -> None:
        """Derive the constants at every call again."""
        self.frozen = None


def freeze_constants(model: nn.Module) -> None:
    """Freeze the derived constants of a whole model, for inference."""
    for module in list(model.modules()):
        if isinstance(module, DerivedConstants):
            module.freeze()


def unfreeze_constants(model: nn.Module) -> None:
    """Undo `freeze_constants`, before training or after loading other weights."""
    for module in list(model.modules()):
        if isinstance(module, DerivedConstants):
            module.unfreeze()
