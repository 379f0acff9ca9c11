"""Triton's interpreter on a CPU: import this first, in a process of its own, with TRITON_INTERPRET=1 set."""

from __future__ import annotations

from typing import Any

import triton.runtime.interpreter as interpreter

_original = interpreter._patch_lang_tensor


def _patched(tensor: Any, scope: Any) -> None:
    """As Triton's, but numpy from 2.4 on turns only arrays without dimensions into numbers."""
    _original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patched
