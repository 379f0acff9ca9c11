"""Nested dataclasses, named tuples and lists as flat, named tensors; sizes of tensors in terms of other sizes.

flatten(cache.layers, "layers") -> {"layers.0.key": tensor, "layers.0.value": tensor, ...}
dimension(4 * s0 + 1, {s0: Dim("B")}) -> 4 * Dim("B") + 1
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import sympy
from torch import SymInt, Tensor
from torch.export import Dim

from .torch_internals import is_found_in_values, size_expression, size_symbol, symbol_bounds


def flatten(value: Any, name: str) -> dict[str, Tensor]:
    """The tensors of a structure by their dotted names. Fields that are no tensors are left out."""
    if isinstance(value, Tensor):
        return {name: value}
    return {n: t for part, item in _parts(value) for n, t in flatten(item, f"{name}.{part}").items()}


def flatten_all(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of several structures; each structure's name is the first part of its tensors' names."""
    return {n: t for name, value in values.items() for n, t in flatten(value, name).items()}


def rebuild(value: Any, name: str, tensor: Callable[[str], Tensor]) -> Any:
    """A copy of a structure with other tensors: `tensor` gives each by the name that `flatten` gives it."""
    if isinstance(value, Tensor):
        return tensor(name)
    parts = {part: rebuild(item, f"{name}.{part}", tensor) for part, item in _parts(value)}
    if isinstance(value, list):
        return list(parts.values())
    if not parts:
        return value
    return value._replace(**parts) if hasattr(value, "_replace") else replace(value, **parts)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if is_dataclass(value):
        yield from ((f.name, getattr(value, f.name)) for f in fields(value))
    elif hasattr(value, "_asdict"):
        yield from value._asdict().items()
    elif isinstance(value, list):
        yield from ((str(i), item) for i, item in enumerate(value))


def root_of(size: int | SymInt, dim: Any) -> dict[sympy.Symbol, Any]:
    """The symbol of a traced size and its torch.export.Dim; `dim` is how the size was declared."""
    if not isinstance(size, SymInt):
        return {}
    return {size_symbol(size): getattr(dim, "root", dim)}


def unbacked(size: int | SymInt) -> dict[sympy.Symbol, Any]:
    """The symbol of a size that a stage reads from its inputs' values, and a new torch.export.Dim for it."""
    if not isinstance(size, SymInt) or not is_found_in_values(size):
        return {}
    symbol = size_symbol(size)
    least, largest = symbol_bounds(size)
    return {symbol: Dim(str(symbol), min=least, max=largest)}


def dimension(size: int | SymInt, roots: Mapping[sympy.Symbol, Any]) -> Any:
    """A traced size as a multiple of a Dim plus a number, or static if it is a number.

    ValueError for a size of another form, which torch.export cannot declare.
    """
    if not isinstance(size, SymInt):
        return Dim.STATIC
    expression = sympy.expand(size_expression(size))
    for symbol, root in roots.items():
        factor = expression.coeff(symbol)
        rest = expression - factor * symbol
        if factor.is_Integer and factor > 0 and rest.is_Integer:
            dim = root if factor == 1 else int(factor) * root
            return dim + int(rest) if rest else dim
    raise ValueError(f"a stage has a tensor of size {expression}, which is no multiple of B or L plus a number")
