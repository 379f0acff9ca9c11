"""Compares the C++ tokenizers with Python's on mixed text, for tokenizers of every kind, trained on the spot.

Ids of texts and texts of ids, right ones and random ones, must be equal. Texts mix English, code, Chinese, Japanese,
Korean, Arabic and other scripts, combining marks, emoji, control characters, special tokens and long runs. Texts with
bytes that are not UTF-8 must be refused with the words that Python has for them.

    python tests/soak/compare_tokenizers.py build/tests/megalodon-tokenize                     # 10 million characters
    python tests/soak/compare_tokenizers.py build-asan/tests/megalodon-tokenize --minutes 30   # fuzzing, each kind

Build with -DMEGALODON_SANITIZE=address,undefined to find errors of memory at the same time.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from megalodon_export.generation.arguments import utf8
from support.tokenizer_kinds import KINDS, mixed_text
from support.tokenizer_program import CppTokenizer

SIZE = 4000  # characters of a text


def differences(python: Tokenizer, cpp: CppTokenizer, seed: int, size: int = SIZE) -> Iterator[str]:
    """The differences for one text."""
    rng = random.Random(seed)
    text = mixed_text(seed, rng.choice((1, 10, 100, size)))
    ids, count = python.encode(text).ids, python.get_vocab_size()
    if cpp.encode(text) != ids:
        yield f"the ids of {shortest(python, cpp, text)!a}"
    others = [rng.randrange(count + 3) for _ in range(rng.choice((1, 10, 300)))]
    for some in (ids, others, rng.choices(others, k=100)):
        if cpp.decode(some) != python.decode(some):
            yield f"the text of {some}"
    wrong = bytearray(text.encode())
    wrong[rng.randrange(len(wrong))] ^= rng.choice((0x80, 0x40, 0xFF))
    if (said := refusal(cpp, bytes(wrong))) != (expected := python_refusal(bytes(wrong))):
        yield f"the refusal of {bytes(wrong)!r}: {said!r} and {expected!r}"


def refusal(cpp: CppTokenizer, text: bytes) -> str:
    """The refusal of a text by the C++ library; empty if it reads the text."""
    try:
        cpp.encode(text)
    except ValueError as error:
        return str(error)
    return ""


def python_refusal(text: bytes) -> str:
    """The refusal of a text by a session."""
    try:
        utf8(text, "the text")
    except ValueError as error:
        return str(error)
    return ""


def shortest(python: Tokenizer, cpp: CppTokenizer, text: str) -> str:
    """A part of a text that still shows the difference."""
    step = len(text) // 2
    while step:
        for start in range(0, len(text), step):
            part = text[:start] + text[start + step :]
            if part and cpp.encode(part) != python.encode(part).ids:
                text = part
                break
        else:
            step //= 2
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", type=Path)
    parser.add_argument("--characters", type=int, default=10_000_000, help="of each kind, about")
    parser.add_argument("--minutes", type=float, help="for each kind, instead of a number of characters")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.kinds:
            file = Path(folder) / "tokenizer.json"
            KINDS[kind]().save(str(file))
            python, cpp = Tokenizer.from_file(str(file)), CppTokenizer(options.program, file)
            begin, count, found = time.monotonic(), 0, []
            per_text = (1 + 10 + 100 + SIZE) / 4
            while len(found) < 3 and (
                count * per_text < options.characters
                if options.minutes is None
                else time.monotonic() - begin < 60 * options.minutes
            ):
                found += differences(python, cpp, options.seed + count)
                count += 1
            said = cpp.close()
            failed = failed or bool(found) or bool(said)
            print(f"{kind}: {count} texts, {time.monotonic() - begin:.0f} s, {len(found)} differences", flush=True)
            print(*found, said, sep="\n", end="")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
