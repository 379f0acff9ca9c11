"""`torch.compile(model)`, which compiles layer by layer as `model.compile()` does.

    compiled = torch.compile(model)
    compiled(torch.randint(257, (2, 300)))     # the first call compiles one layer, the model itself is as before

torch.compile would put all layers into one graph, compile it again for another length, and take longer with every
layer. `fullgraph=True` asks for that graph, and gets it. So does a function that calls the model and is compiled.
The Trainer's `torch_compile=True` compiles layer by layer, with mixed precision as without it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn

from ..compiled import CompiledBackend

# Private interfaces of torch, tested by `tests/model/test_torch_compile.py`: the callback by which torch.compile sees
# Python's frames, its attribute for the compiler, and the order not to compile a function's frame. A torch without them
# compiles the whole model as one graph.
try:
    from torch._C._dynamo.eval_frame import (
        _FrameAction,
        _FrameExecStrategy,
        set_code_exec_strategy,
        set_eval_frame,
    )
except ImportError:
    set_eval_frame = None  # type: ignore[assignment]

_BACKENDS: weakref.WeakKeyDictionary[nn.Module, tuple[Any, CompiledBackend]] = weakref.WeakKeyDictionary()


def compiled_by_layer(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's `forward` which, called through torch.compile(model), compiles layers in place of itself."""
    if set_eval_frame is None:
        return forward

    @wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # it is traced as a part of something larger, or exported
            if "_original_forward" in vars(self) and not torch.compiler.is_exporting():  # accelerate's, for autocast
                torch._dynamo.graph_break()
            return forward(self, *args, **kwargs)
        callback = set_eval_frame(None)
        try:
            compiler = _compiler_of(callback)
            if compiler is not None:
                return _with_backend(getattr(self, "model", self), compiler, forward, self, *args, **kwargs)
        finally:
            set_eval_frame(callback)
        return forward(self, *args, **kwargs)

    code = run.__code__  # type: ignore[attr-defined]  # a function, which `wraps` hides
    set_code_exec_strategy(code, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.DEFAULT))
    return run


def _compiler_of(callback: Any) -> Any:
    """The compiler of torch.compile's callback; None if no call of torch.compile runs, or one with fullgraph=True."""
    compiler = None
    while hasattr(callback, "_torchdynamo_orig_backend"):
        if getattr(callback, "_one_graph", False):
            return None
        compiler = callback = callback._torchdynamo_orig_backend
    return compiler


def _with_backend(body: Any, compiler: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `forward` while the layers of `body` are compiled by a compiler, unless they are compiled already."""
    plain = body.backend
    if isinstance(plain, CompiledBackend):
        return forward(*args, **kwargs)
    known, backend = _BACKENDS.get(body, (None, None))
    if backend is None or known != compiler or backend.inner is not plain:
        backend = CompiledBackend(plain, backend=compiler)
        _BACKENDS[body] = compiler, backend
    body.backend = backend
    try:
        return forward(*args, **kwargs)
    finally:
        body.backend = plain
