"""The settings that shorten a compilation: torch still has what they set, and they change no index."""

from __future__ import annotations

import importlib

import sympy
import torch._dynamo.config

from megalodon_export.model.compile_time import INDEX_FUNCTIONS, index_modules, quick_compilation


def test_torch_has_what_the_settings_change() -> None:
    assert torch._dynamo.config.fake_tensor_cache_enabled is True
    modules, expanding = index_modules()
    assert modules, f"no module of Inductor defines {INDEX_FUNCTIONS}"
    with quick_compilation():
        assert not torch._dynamo.config.fake_tensor_cache_enabled
        assert all(module.sympy is expanding for module in modules)
    assert torch._dynamo.config.fake_tensor_cache_enabled
    assert all(module.sympy is sympy for module in modules)


def test_strides_are_those_of_simplified_indices() -> None:
    """Indices as a layer's kernels have them: products of sizes, quotients and remainders by a constant."""
    functions = importlib.import_module("torch.utils._sympy.functions")
    x, y, blocks = sympy.symbols("x y blocks", integer=True, nonnegative=True)
    quotient, remainder = functions.FloorDiv(x, 32), functions.ModularIndexing(x, 1, 32)
    indices = [
        *(64 * blocks * y + 32 * y + x, 32 * (blocks + 1) * y + 2 * x + 1, (blocks * y + x) * 16 - 32),
        *(2048 * y * blocks + 2048 * quotient + remainder, y + remainder, blocks * y, sympy.Integer(31)),
    ]
    (module,) = index_modules()[0]
    stride_at, in_vector = (getattr(module, name).__wrapped__ for name in INDEX_FUNCTIONS)
    for index in indices:
        for variable in (x, y):
            expected = stride_at(index, variable), stride_at(in_vector(index, variable, 16), variable)
            with quick_compilation():
                actual = stride_at(index, variable), stride_at(in_vector(index, variable, 16), variable)
            for one, other in zip(actual, expected, strict=True):
                assert one == other or sympy.expand(one - other) == 0
                assert one.is_number == other.is_number
