"""Writes the tables of characters in cpp/src/text/ by asking the `tokenizers` package about every character.

Run it with the version of `tokenizers` that the C++ library shall equal: python cpp/tools/unicode_tables.py. The tables
then have the Unicode versions of that package: of Oniguruma for expressions, of Rust for `Digits` and `Whitespace`, and
of its own tables for normal forms.
"""

from __future__ import annotations

import argparse
import string
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path

from tokenizers import Regex, normalizers, pre_tokenizers

SOURCE = Path(__file__).parents[1] / "src" / "text"
CHARACTERS = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
TEXT = "".join(CHARACTERS)
NAMES = "LuLlLtLmLoMnMcMeNdNlNoPcPdPsPePiPfPoSmScSkSoZsZlZpCcCfCoCn"
CATEGORIES = [NAMES[i : i + 2] for i in range(0, len(NAMES), 2)]
FLAGS = ["is_word", "is_han", "is_numeric", "is_rust_word", "is_punctuation", "is_mark"]  # bit 0, bit 1 ...
DIGITS = string.digits + string.ascii_lowercase[:22]  # of numbers in base 32


def spans(pre_tokenizer: pre_tokenizers.PreTokenizer) -> list[tuple[int, int]]:
    """The first character and the end of every piece of `TEXT`."""
    return [span for _, span in pre_tokenizer.pre_tokenize_str(TEXT)]


def members(pieces: Iterable[tuple[int, int]]) -> set[str]:
    """The characters of pieces of `TEXT`."""
    return {CHARACTERS[i] for first, end in pieces for i in range(first, end)}


def matched(expression: str) -> set[str]:
    """The characters that an expression matches."""
    return set(CHARACTERS) - members(spans(pre_tokenizers.Split(Regex(f"(?:{expression})+"), "removed")))


def flag_sets() -> list[set[str]]:
    """The characters that have each flag."""
    words = [(first, end) for first, end in spans(pre_tokenizers.Whitespace())]
    joined = pre_tokenizers.Whitespace()
    is_word = [len(joined.pre_tokenize_str(CHARACTERS[first] + "a")) == 1 for first, _ in words]
    digits = spans(pre_tokenizers.Digits(individual_digits=False))[1::2]  # the first character is no digit
    return [
        matched(r"\w"),
        matched(r"\p{Han}"),
        members(digits),
        members(span for span, one in zip(words, is_word, strict=True) if one),
        set(CHARACTERS) - members(spans(pre_tokenizers.Punctuation("removed"))),
        {c for c, text in normalized(normalizers.StripAccents()).items() if not text},
    ]


def normalized(normalizer: normalizers.Normalizer) -> dict[str, str]:
    """Each character that a normalizer changes, with the text that it becomes."""
    texts = normalizer.normalize_str("\0".join(CHARACTERS[1:])).split("\0")
    return {c: text for c, text in zip(CHARACTERS[1:], texts, strict=True) if c != text}


def base32(number: int) -> str:
    text = ""
    while number or not text:
        number, digit = divmod(number, 32)
        text = DIGITS[digit] + text
    return text


def signed(number: int) -> int:
    """0, 1, 2, 3, 4 for 0, -1, 1, -2, 2."""
    return -2 * number - 1 if number < 0 else 2 * number


def class_runs() -> str:
    """Runs of characters of one category and one set of flags: a category's letter, the flags' letter, the length."""
    category = {c: i for i, name in enumerate(CATEGORIES) for c in matched(rf"\p{{{name}}}")}
    flags = flag_sets()
    letters = string.ascii_uppercase + "!#$"
    keys = [letters[category[c]] + chr(ord("@") + sum((c in one) << i for i, one in enumerate(flags))) for c in TEXT]
    assert not set("".join(keys)) & {"\\", '"', "\x7f"}
    runs = [(key, len(list(group))) for key, group in groupby(keys)]
    return "".join(key + (base32(length) if length > 1 else "") for key, length in runs)


def mapping(changes: dict[str, str]) -> str:
    """Characters and their replacements: each number but a replacement's first is a difference to the one before."""
    last, text = 0, ""
    for c, replacement in sorted(changes.items()):
        numbers = [ord(replacement[0]), *(ord(one) for one in replacement[1:])] if replacement else []
        text += base32(ord(c) - last) + "".join("," + base32(signed(n - ord(c))) for n in numbers) + ";"
        last = ord(c)
    return text


def is_hangul(c: str) -> bool:
    return 0xAC00 <= ord(c) < 0xD7A4


def compositions(canonical: dict[str, str]) -> Iterator[tuple[str, str]]:
    """The characters that a pair composes to, and the pair."""
    compose: Callable[[str], str] = normalizers.NFC().normalize_str
    for c, text in canonical.items():
        if len(text) > 1 and compose(text) == c:
            first = compose(text[:-1])
            assert len(first) == 1
            assert compose(first + text[-1]) == c
            yield c, first + text[-1]


def combining_classes() -> dict[str, int]:
    """The canonical combining classes that order marks."""
    order: Callable[[str], str] = normalizers.NFD().normalize_str
    decomposed = normalized(normalizers.NFD())

    def is_known(c: str) -> bool:
        return order("\u0345" + c) != "\u0345" + c or order(c + "\u0334") != c + "\u0334"

    marks = [c for c in CHARACTERS if unicodedata.category(c)[0] == "M" and c not in decomposed and is_known(c)]
    samples = {unicodedata.combining(c): c for c in marks}

    def value(c: str) -> int:
        return next(v for v, one in samples.items() if order(c + one) == c + one and order(one + c) == one + c)

    return {c: value(c) for c in marks}


def class_text(classes: dict[str, int]) -> str:
    """Characters that order: the difference to the last one, then the class."""
    last, text = 0, ""
    for c, value in sorted(classes.items()):
        text += f"{base32(ord(c) - last)},{base32(value)};"
        last = ord(c)
    return text


def literal(name: str, text: str) -> str:
    """A C++ constant, in lines of 120 columns."""
    width = 116
    lines = [f'    "{text[i : i + width - 2]}"' for i in range(0, len(text), width - 2)]
    return f"const char* const {name} =\n" + "\n".join(lines) + ";\n"


def tables() -> dict[str, str]:
    """The files and their content."""
    canonical = {c: text for c, text in normalized(normalizers.NFD()).items() if not is_hangul(c)}
    compatible = normalized(normalizers.NFKD())
    compatible = {c: text for c, text in compatible.items() if canonical.get(c) != text and not is_hangul(c)}
    classes = (
        literal("kClassRuns", class_runs()) + "\n" + literal("kLowercase", mapping(normalized(normalizers.Lowercase())))
    )
    forms = [
        literal("kCombiningClasses", class_text(combining_classes())),
        literal("kCanonical", mapping(canonical)),
        literal("kCompositions", mapping(dict(compositions(canonical)))),
    ]
    content = {
        "classes": classes,
        "canonical": "\n".join(forms),
        "compatible": literal("kCompatible", mapping(compatible)),
    }
    head = "// Written by cpp/tools/unicode_tables.py, which says what it is. Do not edit.\n"
    head += '#include "text/unicode_tables.hpp"\n'
    return {
        f"unicode_{name}.cpp": f"{head}\nnamespace megalodon::impl {{\n\n{text}\n}}  // namespace megalodon::impl\n"
        for name, text in content.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=SOURCE)
    folder = parser.parse_args().folder
    for name, content in tables().items():
        (folder / name).write_text(content)


if __name__ == "__main__":
    main()
