"""The C++ tokenizers give the ids and the text that Python's give, and refuse what they cannot read exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from megalodon_export import load
from megalodon_export.export.aoti import export_aoti
from megalodon_export.generation.text import TextStream
from soak.compare_tokenizers import differences
from support import native
from support.small_models import make_model
from support.tokenizer_kinds import KINDS, byte_level, mixed_text, sentencepiece_bpe, unigram
from support.tokenizer_program import CppTokenizer

SIZES = {
    **{"model_dim": 32, "num_heads": 2, "z_dim": 16, "value_dim": 24, "ffn_hidden_dim": 48, "cema_ndim": 4},
    **{"norm_num_groups": 4},
}
Pair = tuple[Tokenizer, CppTokenizer]


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest, cpp_build: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A tokenizer in Python and in C++."""
    python = request.param() if callable(request.param) else KINDS[request.param]()
    return both(python, cpp_build, tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def both(python: Tokenizer, cpp_build: Path, file: Path) -> Pair:
    """A tokenizer, and what C++ reads from its file."""
    python.save(str(file))
    return Tokenizer.from_file(str(file)), CppTokenizer(cpp_build / "tests" / "megalodon-tokenize", file)


@pytest.mark.parametrize("pair", KINDS, indirect=True)
def test_ids_and_text_are_pythons(pair: Pair) -> None:
    """`tests/soak/compare_tokenizers.py` does this with 10 million characters, and for as long as one likes."""
    assert [said for seed in range(25) for said in differences(*pair, seed)] == []


@pytest.mark.parametrize("pair", ["gpt2", "llama2", "gemma", "words"], indirect=True)
def test_streams_join_to_the_text_of_pythons_streams(pair: Pair) -> None:
    python, cpp = pair
    ids = python.encode(mixed_text(7, 3000)).ids[::2]
    stream = TextStream(python)
    assert cpp.decode(ids) == "".join(map(stream.push, ids)) + stream.flush()


@pytest.mark.parametrize("make", [byte_level, sentencepiece_bpe, lambda: unigram("never", split=False)])
@pytest.mark.parametrize("unit", ["a", " ", "\n", "é", "本", "\U0001f600", "aA1", "ab ", "'", "\u0301"])
def test_a_text_of_one_long_run(make, unit: str, cpp_build: Path, tmp_path: Path) -> None:
    """One word of 100,000 characters. Work of more than n log n would take minutes."""
    python, cpp = both(make(), cpp_build, tmp_path / "tokenizer.json")
    text = unit * (100_000 // len(unit))
    assert cpp.encode(text) == python.encode(text).ids


@pytest.mark.parametrize("text", ["", " ", "<", "a\0b", "\ufeff", "[MASK]", " [MASK] ", "<pad>  <pad>", "word words"])
@pytest.mark.parametrize("pair", ["llama3", "llama2, unknown", "t5, first"], indirect=True)
def test_short_texts(pair: Pair, text: str) -> None:
    python, cpp = pair
    assert cpp.encode(text) == python.encode(text).ids


def test_a_character_without_a_token_is_refused_as_in_python(cpp_build: Path, tmp_path: Path) -> None:
    """A Unigram model without an unknown token, and a BPE model whose unknown token is not in the vocabulary."""
    for name, model in (
        ("unigram", models.Unigram([("a", -1.0)], unk_id=None)),
        ("bpe", models.BPE({"a": 0}, [], unk_token="<unk>")),
    ):
        python, cpp = both(Tokenizer(model), cpp_build, tmp_path / f"{name}.json")
        assert cpp.encode("aa") == python.encode("aa").ids == [0, 0]
        with pytest.raises(Exception, match=r"unk|Unk"):
            python.encode("ab")
        with pytest.raises(
            ValueError, match=r"the text has a character that the tokenizer does not know.*pass token ids"
        ):
            cpp.encode("ab")


# Parts that tokenizers in use have, or may have, and that this library would not match exactly.
REFUSED = [
    *(r"^a", r"a$", r"\bword", r"\Aa", r"(?i)a", r"(?i:é)", r"(?i:fi)", r"(?i:\p{L})", r"(?i:\w)", r"(?i:(?:f)i)"),
    *(
        r"\p{Greek}",
        r"\p{Alphabetic}",
        r"[[:alpha:]]",
        r"[a&&b]",
        r"\h",
        r"\X",
        r"\R",
        r"(?<name>a)",
        r"(a)\1",
        r"a{,3}",
    ),
    *(r"a{2}?", r"\G", r"(?#x)"),
]


@pytest.mark.parametrize("expression", REFUSED)
def test_expressions_that_are_refused(expression: str, cpp_build: Path, tmp_path: Path) -> None:
    python = Tokenizer(models.BPE({"a": 0}, []))
    python.pre_tokenizer = pre_tokenizers.Split(Regex(expression), "isolated")
    with pytest.raises(ValueError, match=r"tokenizer.json, which has the expression .+ with .+; pass token ids"):
        both(python, cpp_build, tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"normalizer": {"type": "BertNormalizer", "clean_text": True}}, "the normalizer BertNormalizer"),
        ({"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}}, "an empty pattern"),
        ({"pre_tokenizer": {"type": "UnicodeScripts"}}, "the pre-tokenizer UnicodeScripts"),
        ({"decoder": {"type": "CTC"}}, "the decoder CTC"),
        ({"model": {"type": "WordLevel", "vocab": {}}}, "the model WordLevel"),
        ({"padding": {"strategy": "BatchLongest"}}, "padding"),
        ({"added_tokens": 3}, "added tokens that are no list"),
        ({"post_processor": {}}, "a field type that is missing or of another type"),
        ({"normalizer": []}, "a field type that is missing or of another type"),
    ],
)
def test_parts_that_are_refused_by_name(change: dict, name: str, cpp_build: Path, tmp_path: Path) -> None:
    file = json.loads(byte_level().to_str()) | change
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(file))
    with pytest.raises(ValueError, match="does not read") as refused:
        CppTokenizer(cpp_build / "tests" / "megalodon-tokenize", path)
    assert str(refused.value).strip() == (
        f"this library does not read the bundle's tokenizer.json, which has {name}; pass token ids"
    )


@pytest.mark.slow  # an export: the only test that generates text with another tokenizer than bytes
def test_a_bundle_with_sentencepiece_bpe_writes_pythons_text(cpp_build: Path, tmp_path: Path) -> None:
    sizes = {"vocab_size": 1500, "bos_token_id": 1, "eos_token_id": 2, "num_layers": 1, "chunk_size": 8}
    make_model(torch.float32, **(SIZES | sizes)).save_pretrained(tmp_path / "checkpoint")
    sentencepiece_bpe().save(str(tmp_path / "checkpoint" / "tokenizer.json"))
    export_aoti(tmp_path / "checkpoint", tmp_path / "bundle", "cpu")
    session = load(tmp_path / "bundle")
    prompt = "In the beginning  é日本 \U0001f600 <s>x"
    for options in ({}, {"temperature": 0.8, "seed": 3}):
        text = "".join(session.generate(prompt, max_new_tokens=60, **options))
        session.reset()
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        done = native.cli(cpp_build, tmp_path / "bundle", "--prompt", prompt, "--max-new-tokens", 60, *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout in (text, text + "\n")
