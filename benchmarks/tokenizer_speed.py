"""Measure how fast the C++ library tokenizes beside Python's `tokenizers`, on one core, in alternating runs.

    python benchmarks/tokenizer_speed.py build/tests/megalodon-tokenize --out FILE

The tokenizers have 32,000 tokens and are trained on the spot: byte-level BPE with the expressions of GPT-2 and Llama 3,
BPE as Llama 2 has it, and a Unigram model. The English is the help text of Python, the code is this repository's, and
the mixed text has many scripts. A speed is the median of the runs, in millions of bytes of UTF-8 per second. Each text
is encoded whole, as a prompt is, and both sides keep their caches from run to run. `encode` is what a session calls;
`encode_batch_fast` computes no offsets. The ratio is that of the C++ library to the faster of the two.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

from report import head
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.tokenizer_kinds import LLAMA3, mixed_text
from support.tokenizer_program import CppTokenizer

ROOT = Path(__file__).parents[1]
VOCABULARY = 32_000
BYTES = 1_000_000  # of a text


def texts() -> dict[str, str]:
    """The texts by their names."""
    code = "".join(path.read_text() for path in sorted(ROOT.rglob("*.[ch]pp")) + sorted(ROOT.rglob("*.py")))
    found = {"english": "\n".join(topics.values()), "code": code, "mixed": mixed_text(5, BYTES)}
    return {name: text.encode()[:BYTES].decode(errors="ignore") for name, text in found.items()}


def tokenizers(corpus: list[str]) -> dict[str, Callable[[], Tokenizer]]:
    """How each kind is made."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()

    def byte_level(pattern: str | None) -> Tokenizer:
        tokenizer = Tokenizer(models.BPE())
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
        split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(corpus, trainer)
        return tokenizer

    def llama2() -> Tokenizer:
        trained = Tokenizer(models.BPE(unk_token="<unk>"))
        trained.pre_tokenizer = pre_tokenizers.Metaspace()
        names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=names, show_progress=False)
        trained.train_from_iterator(corpus, trainer)
        model = json.loads(trained.to_str())["model"]
        merges = [tuple(pair) for pair in model["merges"]]
        tokenizer = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        return tokenizer

    def unigram() -> Tokenizer:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=8000, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
        )
        tokenizer.train_from_iterator(corpus, trainer)
        return tokenizer

    return {
        "GPT-2": lambda: byte_level(None),
        "Llama 3": lambda: byte_level(LLAMA3),
        "Llama 2": llama2,
        "Unigram": unigram,
    }


def compare(python: Tokenizer, cpp: CppTokenizer, text: str, runs: int) -> dict[str, float]:
    """The speeds of both, and how many times faster C++ is."""
    assert cpp.encode(text) == python.encode(text).ids
    calls: dict[str, Callable[[], object]] = {
        "encode": lambda: python.encode(text),
        "encode_batch_fast": lambda: python.encode_batch_fast([text]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*calls, "cpp")}
    for _ in range(runs):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
        seconds["cpp"].append(cpp.seconds(text))
    size = len(text.encode()) / 1e6
    speeds = {name: round(size / statistics.median(some), 2) for name, some in seconds.items()}
    return speeds | {"ratio": round(speeds["cpp"] / max(speeds[name] for name in calls), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # read when a text is encoded
    found, all_texts = [], texts()
    corpus = [text[i : i + 1000] for text in all_texts.values() for i in range(0, len(text), 1000)]
    with tempfile.TemporaryDirectory() as folder:
        for kind, make in tokenizers(corpus).items():
            file = Path(folder) / "tokenizer.json"
            make().save(str(file))
            python, cpp = Tokenizer.from_file(str(file)), CppTokenizer(options.program, file)
            for name, text in all_texts.items():
                found.append({"tokenizer": kind, "text": name, **compare(python, cpp, text, options.runs)})
                print(found[-1], flush=True)
    if options.out:
        options.out.write_text(json.dumps({**head("cpu"), "MB_per_s": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
