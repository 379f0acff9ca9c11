"""A converted tokenizer.model gives SentencePiece's ids and text; models of other kinds are refused."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from megalodon_export.__main__ import main
from megalodon_export.bundles.sentencepiece import tokenizer_from_sentencepiece, write_tokenizer
from support.golden_data import write_checkpoint
from support.tokenizer_kinds import corpus, mixed_text

sentencepiece = pytest.importorskip("sentencepiece")
LLAMA2: dict[str, Any] = {
    **{"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "split_digits": True},
    **{"remove_extra_whitespaces": False, "character_coverage": 0.98, "allow_whitespace_only_pieces": True},
    **{"vocab_size": 1500, "minloglevel": 2},
}


def trained(**options: Any) -> bytes:
    """A model, trained on the texts that the other tokenizers are trained on."""
    lines = (line for text in corpus() for line in text.splitlines() if line.strip())
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=out, **LLAMA2 | options)
    return out.getvalue()


@pytest.fixture(scope="module")
def llama2() -> bytes:
    """A model as Llama 2's."""
    return trained()


def test_ids_and_text_are_sentencepieces(llama2: bytes) -> None:
    original, ours = sentencepiece.SentencePieceProcessor(model_proto=llama2), tokenizer_from_sentencepiece(llama2)
    for seed in range(60):
        # Only ours finds special tokens in a text. SentencePiece's texts end at a zero byte, and its spaces are U+2581.
        text = re.sub("<s>|</s>|<unk>|\0|\u2581", "", mixed_text(seed, 1000))
        ids = original.encode(text, add_bos=True)
        assert ours.encode(text).ids == ids
        assert ours.decode(ids) == original.decode(ids)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram", "vocab_size": 600}, "its model is not BPE"),
        ({"byte_fallback": False}, "it has no tokens for bytes"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it normalizes characters"),
        ({"remove_extra_whitespaces": True}, "it removes spaces"),
        ({"user_defined_symbols": ["<tool>"]}, "it has tokens that are defined by hand"),
        ({"add_dummy_prefix": False}, "it puts no space before a text"),
    ],
)
def test_other_models_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"{reason}, and only models as Llama 2's are converted"):
        tokenizer_from_sentencepiece(trained(**options))


@pytest.mark.parametrize("size", [1, 7, 100, 5000])
def test_a_damaged_model_is_refused(llama2: bytes, size: int, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(llama2[:size])
    said = write_tokenizer(tmp_path)
    assert re.search(r"tokenizer\.json is not written from tokenizer\.model: .+; without it, pass token ids$", said)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]


def test_convert_writes_the_tokenizer(llama2: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint("model_base", tmp_path / "source")
    (source / "tokenizer.model").write_bytes(llama2)
    command = ["megalodon-export", "convert", "upstream", str(source), str(tmp_path / "converted")]
    monkeypatch.setattr(sys, "argv", command)
    main()
    text = (tmp_path / "converted" / "tokenizer.json").read_text(encoding="utf-8")
    assert '"byte_fallback": true' in text


def test_a_tokenizer_json_is_kept(llama2: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(llama2)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert write_tokenizer(tmp_path) == ""
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
