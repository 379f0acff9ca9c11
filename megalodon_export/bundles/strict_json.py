"""JSON as both this package and the C++ library read it: what one of them refuses, the other refuses too.

A file is UTF-8 without a byte order mark. Keys of an object are unique. Numbers are finite, and whole numbers fit in 64
bits with a sign. Strings hold no lone surrogates. Values are nested at most MAX_DEPTH deep.
The same rules in C++: cpp/src/bundle/json.cpp.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

MAX_DEPTH = 100


def parse_json(data: bytes) -> Any:
    """The value that the bytes of a JSON file stand for; ValueError says why they are not one."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from error
    if text.startswith("\ufeff"):
        raise ValueError("a byte order mark at its beginning")
    hooks: dict[str, Any] = {"parse_int": _whole, "parse_float": _finite, "parse_constant": _finite}
    try:
        value = json.loads(text, object_pairs_hook=_unique, **hooks)
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from error
    if any(map(_SURROGATE.search, strings(value))):
        raise ValueError("a lone surrogate in a string")
    return value


def strings(value: Any) -> Iterator[str]:
    """Every string of a JSON value, keys included; ValueError if the value is nested too deep."""
    level, depth = [value], 0
    while level:
        below: list[Any] = []
        for one in level:
            if isinstance(one, str):
                yield one
            elif isinstance(one, dict):
                yield from one
                below += one.values()
            elif isinstance(one, list):
                below += one
        if depth == MAX_DEPTH and any(isinstance(one, (dict, list)) for one in level):
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        level, depth = below, depth + 1


# Characters that a terminal obeys instead of showing them: control characters, and those that are invisible or change
# the order of the text around them.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def has_control_characters(text: str) -> bool:
    """Whether a text holds characters that a terminal obeys instead of showing them."""
    return _CONTROL.search(text) is not None


def shown(text: str) -> str:
    r"""A name for a message: control characters and bytes that are not UTF-8 become \xNN or \uNNNN."""

    def escape(character: str) -> str:
        code = ord(character)
        if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte of a file's name that is not UTF-8
            code -= 0xDC00
        elif not has_control_characters(character):
            return character
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

    return "".join(map(escape, text))


def shown_lines(text: str) -> str:
    """A text whose control characters are escaped, but for ends of lines."""
    return "\n".join(map(shown, text.split("\n")))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key that an object has twice")
    return found


def _whole(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise ValueError("a whole number beyond 64 bits")
    return int(digits)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number that is not finite")
    return value
