"""The training text: its split by book, its token ids, and how much of the held-out part the training part repeats."""

from __future__ import annotations

import lzma
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

END_OF_TEXT = 256  # the only token that is not a byte
HELD_OUT = 0.05  # share of each book, its last verses: never trained on, measured once
VALIDATION = 0.01  # share of each book, the verses before those: never trained on, they choose the checkpoint
REPEAT = 50  # shortest passage, in bytes, that counts as repeated

_REFERENCE = re.compile(rb"^(\d?[A-Za-z]+)\d+:\d+ ")


@dataclass(frozen=True)
class Corpus:
    """One text per book for each of the three parts, in the order of the text."""

    train: list[bytes]
    validation: list[bytes]
    held_out: list[bytes]


def split(text: bytes) -> Corpus:
    """Cut every book's last verses off: 5% (rounded up) held out, and 1% (rounded up) before them for validation.

    `text` has one verse on each line: `Ge1:1 In the beginning ...`. Raises ValueError for a line of another form.
    """
    parts = Corpus([], [], [])
    for verses in _books(text):
        held_out = len(verses) - math.ceil(HELD_OUT * len(verses))
        validation = held_out - math.ceil(VALIDATION * len(verses))
        parts.train.append(b"".join(verses[:validation]))
        parts.validation.append(b"".join(verses[validation:held_out]))
        parts.held_out.append(b"".join(verses[held_out:]))
    return parts


def token_ids(texts: list[bytes]) -> list[int]:
    """The texts as one stream of ids: their bytes, with END_OF_TEXT before the first and after each."""
    stream = [END_OF_TEXT]
    for text in texts:
        stream.extend(text)
        stream.append(END_OF_TEXT)
    return stream


def repeated_share(corpus: Corpus) -> float:
    """Share of the held-out bytes inside passages of at least REPEAT bytes that the training part also has."""
    known = {text[i : i + REPEAT] for text in corpus.train for i in range(len(text) - REPEAT + 1)}
    covered = 0
    for text in corpus.held_out:
        end = 0  # bytes before this one are counted already
        for i in range(len(text) - REPEAT + 1):
            if text[i : i + REPEAT] in known:
                covered += i + REPEAT - max(end, i)
                end = i + REPEAT
    return covered / sum(map(len, corpus.held_out))


def xz_bits_per_byte(text: bytes) -> float:
    """Bits that `xz -9e` needs for each byte of the text."""
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def _books(text: bytes) -> Iterator[list[bytes]]:
    book: list[bytes] = []
    name = b""
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        reference = _REFERENCE.match(line)
        if reference is None:
            raise ValueError(
                f"line {number} is {line[:40]!r}, expected a verse like 'Ge1:1 In the beginning ...'; "
                "write the text with `bible -f gen1:1-rev22:21`"
            )
        if book and reference[1] != name:
            yield book
            book = []
        name = reference[1]
        book.append(line)
    if book:
        yield book
