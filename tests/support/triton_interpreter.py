"""Triton's interpreter on a CPU: import this first, in a process of its own, with TRITON_INTERPRET=1 set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter

_original = interpreter._patch_lang_tensor
_splat = interpreter.InterpreterBuilder.create_splat
_dot = interpreter.InterpreterBuilder.create_dot
_patch_language = interpreter._patch_lang
_patched_modules: set[int] = set()  # ids of their globals


class _Forever:
    """Stands for a set of patches that are never undone."""

    def restore(self) -> None:
        """Leave the patches in place."""


def _patch_once(function: Callable[..., Any]) -> _Forever:
    """Replace Triton's language by numpy for all functions of a module, once.

    Triton does it again at every launch and at every call from one kernel to another, which took 40% of the time.
    """
    if id(function.__globals__) not in _patched_modules:
        _patched_modules.add(id(function.__globals__))
        _patch_language(function)
    return _Forever()


def _patched(tensor: Any, scope: Any) -> None:
    """Let tensors with one element be indices: numpy from 2.4 on turns only arrays without dimensions into numbers."""
    _original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _create_splat(self: Any, ret_ty: Any, arg: Any) -> Any:
    """Keep comparisons boolean: Triton 3.9 broadcasts them in their operands' type, and then they mask nothing."""
    block = _splat(self, ret_ty, arg)
    block.data = block.data.astype(arg.data.dtype)
    return block


def _create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
    """Multiply bfloat16 as float32: Triton's interpreter multiplies the bits as if they were integers."""
    a, b = (_float32(t) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
    return _dot(self, a, b, *others)


def _float32(t: Any) -> Any:
    bits = t.data.view(np.uint16).astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


interpreter._patch_lang = _patch_once
# Without a check of every integer operation, which is off on a GPU as well: it takes five operations more.
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
interpreter._patch_lang_tensor = _patched
interpreter.InterpreterBuilder.create_dot = _create_dot
interpreter.InterpreterBuilder.create_splat = _create_splat
