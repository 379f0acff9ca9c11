"""Settings of torch's compilers that shorten a compilation and change nothing in what it makes.

    with quick_compilation():
        compiled(x)        # should this call compile, it takes two thirds of the time

Private interfaces of torch: `torch._dynamo.config.fake_tensor_cache_enabled`, and the name `sympy` in the modules of
Inductor that have the functions INDEX_FUNCTIONS. `tests/model/test_compile_time.py` tests both.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

# Functions of Inductor's code generator for CPUs: how far an index moves with a variable, and the index in a vector.
INDEX_FUNCTIONS = ("stride_at", "simplify_index_in_vec_range")
_MODULES = ("torch._inductor.sizevars", "torch._inductor.codegen.cpp")  # torch has moved them from the second


@contextmanager
def quick_compilation() -> Iterator[None]:
    """Compile without torch's cache of fake tensors, and expand indices instead of simplifying them.

    Where sizes are symbols, computing the keys of that cache costs more than it saves. An index is a sum of products:
    `sympy.simplify` tries many forms of it, and `sympy.expand` finds the same in a tenth of the time.
    """
    config: Any = importlib.import_module("torch._dynamo.config")
    modules, expanding = index_modules()
    before = config.fake_tensor_cache_enabled, [module.sympy for module in modules]
    config.fake_tensor_cache_enabled = False
    for module in modules:
        module.sympy = expanding
    try:
        yield
    finally:
        config.fake_tensor_cache_enabled = before[0]
        for module, sympy in zip(modules, before[1], strict=True):
            module.sympy = sympy


@functools.cache
def index_modules() -> tuple[list[Any], ModuleType]:
    """The modules of Inductor that define the functions INDEX_FUNCTIONS, and a sympy whose `simplify` expands."""
    import sympy

    expanding = ModuleType("sympy")
    vars(expanding).update(vars(sympy))
    expanding.simplify = sympy.expand  # type: ignore[attr-defined]
    modules = [importlib.import_module(name) for name in _MODULES]
    return [module for module in modules if any(map(functools.partial(_defines, module), INDEX_FUNCTIONS))], expanding


def _defines(module: ModuleType, name: str) -> bool:
    return getattr(getattr(module, name, None), "__module__", None) == module.__name__
