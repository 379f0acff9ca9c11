"""Checks of what callers give: token ids, texts, numbers. Inner code trusts what these functions return.

Each returns its argument in the plain type of Python, or raises ValueError with one sentence. Scalars and arrays of
numpy and tensors of torch, on any device, count as the Python values that their `tolist` gives.
"""

from __future__ import annotations

import math
import numbers
import operator
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

_DEVICE = re.compile("cpu|cuda(:[0-9]{1,2})?")
LARGEST = 2**63 - 1  # the largest count that the C++ library takes


def token_ids(values: object, vocab_size: int, whose: str = "") -> list[int]:
    """A sequence of token ids, all of them in the vocabulary; `whose` goes into the error, such as " of prompt 2"."""
    sequence = plain(values)
    if isinstance(sequence, str | bytes | bytearray) or not isinstance(sequence, Iterable):
        raise ValueError(f"the token ids{whose} are {show(sequence)}, expected a sequence of integers")
    ids = list(sequence)
    if not all(type(one) is int for one in ids):
        ids = [_integer_id(one, vocab_size, whose) for one in ids]
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        _refuse_id(next(one for one in ids if not 0 <= one < vocab_size), vocab_size, whose)
    return ids


def token_id(value: object, vocab_size: int) -> int:
    """One token id of the vocabulary."""
    one = _integer_id(value, vocab_size)
    return one if 0 <= one < vocab_size else _refuse_id(one, vocab_size)


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """ValueError that names the first of the token ids (B, ...) which the vocabulary lacks.

    On a GPU this waits for the device.
    """
    low, high = torch.stack(ids.aminmax()).tolist()
    if low >= 0 and high < vocab_size:
        return
    first = ((ids < 0) | (ids >= vocab_size)).nonzero()[0].tolist()
    _refuse_id(int(ids[tuple(first)]), vocab_size, f" of row {first[0]}" if ids.shape[0] > 1 else "")


def _integer_id(value: object, vocab_size: int, whose: str = "") -> int:
    one = plain(value)
    if not is_integer(one):
        kind, expected = type(one).__name__, f"an integer in 0..{vocab_size - 1}"
        raise ValueError(f"token id {show(one)}{whose} is of type {kind}, expected {expected}")
    return operator.index(one)


def _refuse_id(one: int, vocab_size: int, whose: str = "") -> int:
    raise ValueError(f"token id {show(one)}{whose} is outside 0..{vocab_size - 1}; is this the model's tokenizer?")


def integer(name: str, value: object, least: int, most: int = LARGEST) -> int:
    """A whole number of a range."""
    found = plain(value)
    if not is_integer(found):
        raise ValueError(f"{name} is {show(found)}, expected an integer")
    whole = operator.index(found)
    if whole < least:
        raise ValueError(f"{name} is {show(whole)}, expected at least {least}")
    if whole > most:
        raise ValueError(f"{name} is {show(whole)}, expected at most {most}")
    return whole


def text(value: object, name: str = "the prompt") -> str:
    """A text that UTF-8 can hold. `name` says in the error which one it is."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {show(value)} of type {type(value).__name__}, expected text: a str")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # a surrogate stands for a byte that is not UTF-8, or for half a character
        raise ValueError(f"{name} is not UTF-8 at byte {len(value[: error.start].encode())}") from None
    return value


def utf8(data: bytes, name: str = "the prompt") -> str:
    """Bytes of UTF-8 as text."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 at byte {error.start}") from None


def texts(values: object, name: str = "prompts") -> list[str]:
    """Several texts."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ValueError(f"{name} is {show(values)} of type {type(values).__name__}, expected a list of texts")
    return [text(value, f"{name}[{index}]") for index, value in enumerate(values)]


def stop_strings(stop: object) -> tuple[str, ...]:
    """The strings that end a text: none, one, or several, none of them empty."""
    stops = () if stop is None else (text(stop, "stop"),) if isinstance(stop, str) else texts(stop, "stop")
    if "" in stops:
        raise ValueError("an empty stop string would end every text at once; expected non-empty strings, drop it")
    return tuple(stops)


def device(value: object) -> str | None:
    """The name of a device, or None for the default."""
    name = str(value) if isinstance(value, torch.device) else value
    if name is None or (isinstance(name, str) and _DEVICE.fullmatch(name)):
        return name
    raise ValueError(f'device is {show(value)}, expected "cpu", "cuda", or one GPU of several: "cuda:1"')


def path(value: object, name: str) -> Path:
    """A path on the disk. `name` says in the error which one it is."""
    if not isinstance(value, str | Path):
        raise ValueError(f"{name} is {show(value)} of type {type(value).__name__}, expected a path: a str or a Path")
    return Path(value)


def switch(name: str, value: object) -> bool:
    """True or False."""
    found = plain(value)
    if not isinstance(found, bool):
        raise ValueError(f"{name} is {show(found)}, expected True or False")
    return found


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def number(value: object) -> float:
    """A number as a float: NaN for what is none, infinity for one that is too large."""
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, numbers.Real):
        return math.nan
    try:
        return float(found)
    except OverflowError:
        return math.inf


def plain(value: object) -> object:
    """The Python value of a scalar, an array or a tensor; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def show(value: object) -> str:
    """A value as an error shows it: short, and on one line."""
    try:
        return " ".join(reprlib.repr(plain(value)).split())
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a huge integer"
