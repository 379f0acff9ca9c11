"""Sizes in terms of a graph's symbols, in reverse Polish notation: the operator library evaluates them at each run.

264 // B  ->  "264,B,//"          B, the multiples of L, and whole numbers; + * // % min max
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce

import sympy

_OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
    "min": min,
    "max": max,
}
# torch has classes of its own for some of sympy's: they are told apart by their names.
_NAMES = {
    **{"Add": "+", "Mul": "*", "FloorDiv": "//", "CleanDiv": "//", "IntTrueDiv": "//"},
    **{"Mod": "%", "PythonMod": "%", "Min": "min", "Max": "max"},
}


def to_text(expression: sympy.Expr) -> str:
    """A size as the operator library reads it; ValueError for a form that it does not know."""
    if expression.is_Integer or expression.is_Symbol:
        return str(expression)
    name = _NAMES.get(type(expression).__name__)
    if name is None:
        raise ValueError(f"a launch depends on {expression}, which the operator library cannot compute")
    parts = [to_text(part) for part in expression.args]
    return reduce(lambda text, part: f"{text},{part},{name}", parts)


def evaluate(text: str, symbols: Mapping[str, int]) -> int:
    """The value of a size, computed as the operator library does."""
    stack: list[int] = []
    for token in text.split(","):
        if token in _OPERATORS:
            second, first = stack.pop(), stack.pop()
            stack.append(_OPERATORS[token](first, second))
        else:
            stack.append(symbols[token] if token in symbols else int(token))
    (value,) = stack
    return value


def is_multiple_of_16(expression: sympy.Expr) -> bool:
    """Whether a size is a multiple of 16 whatever its symbols are."""
    return all(factor.is_Integer and int(factor) % 16 == 0 for factor in expression.as_coefficients_dict().values())


def is_number(expression: sympy.Expr, number: int) -> bool:
    """Whether a size is this number, whatever its symbols are."""
    return bool(expression.is_Integer) and int(expression) == number
