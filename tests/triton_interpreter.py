"""Triton's interpreter on a CPU: import this first, in a process of its own, with TRITON_INTERPRET=1 set."""

from __future__ import annotations

from typing import Any

import triton.runtime.interpreter as interpreter

_original = interpreter._patch_lang_tensor
_splat = interpreter.InterpreterBuilder.create_splat


def _patched(tensor: Any, scope: Any) -> None:
    """As Triton's, but numpy from 2.4 on turns only arrays without dimensions into numbers."""
    _original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _create_splat(self: Any, ret_ty: Any, arg: Any) -> Any:
    """As Triton's, but what a comparison gave stays boolean: 3.9 spreads it as its operands' type, no mask any more."""
    block = _splat(self, ret_ty, arg)
    block.data = block.data.astype(arg.data.dtype)
    return block


interpreter._patch_lang_tensor = _patched
interpreter.InterpreterBuilder.create_splat = _create_splat
