"""SentencePiece's tokenizer.model to tokenizer.json, for models as Llama 2's: BPE with bytes for unknown characters."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from .manifest import TOKENIZER

_SPACE = "▁"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # types of pieces; others need no care
_BPE = 2
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of a model
_MODEL_TYPE, _BYTE_FALLBACK, _BOS = 3, 35, 41  # fields of its trainer
_CHARACTER_MAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 2, 3, 4, 5  # fields of its normalizer

Field = int | bytes


class Piece(NamedTuple):
    """A token, its score and its type."""

    text: str
    score: float
    kind: int


def tokenizer_from_sentencepiece(data: bytes) -> Tokenizer:
    """The tokenizer of a tokenizer.model, which puts the beginning-of-text token before a text.

    Raises ValueError for a file that is no such model, or a model of another kind.
    """
    try:
        message = list(_fields(data))
        pieces = [_piece(value) for number, value in message if number == _PIECES and isinstance(value, bytes)]
        trainer, normalizer = _message(message, _TRAINER), _message(message, _NORMALIZER)
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"it is no SentencePiece model, or damaged ({error})") from None
    _check(pieces, trainer, normalizer)
    return _make(pieces, int(trainer.get(_BOS, 1)))


def write_tokenizer(folder: Path) -> str:
    """Writes a folder's tokenizer.json from its tokenizer.model, if it has only the latter. What to tell the user."""
    model, destination = folder / "tokenizer.model", folder / TOKENIZER
    if not model.is_file() or destination.exists():
        return ""
    try:
        text = tokenizer_from_sentencepiece(model.read_bytes()).to_str(pretty=True)
    except ValueError as error:
        return f"{destination} is not written from tokenizer.model: {error}; without it, pass token ids"
    staged = destination.with_name(f".{TOKENIZER}")
    staged.write_text(text, encoding="utf-8")
    staged.replace(destination)
    return ""


def _check(pieces: list[Piece], trainer: dict[int, Field], normalizer: dict[int, Field]) -> None:
    found = {
        "its model is not BPE": trainer.get(_MODEL_TYPE, 1) != _BPE,
        "it has no tokens for bytes": not trainer.get(_BYTE_FALLBACK, 0),
        "it normalizes characters": bool(normalizer.get(_CHARACTER_MAP, b"")),
        "it puts no space before a text": not normalizer.get(_DUMMY_PREFIX, 1),
        "it removes spaces": bool(normalizer.get(_REMOVE_SPACES, 1)),
        "it keeps spaces as they are": not normalizer.get(_ESCAPE_SPACES, 1),
        "it has tokens that are defined by hand": any(piece.kind == _USER_DEFINED for piece in pieces),
        "it has not one unknown token": sum(piece.kind == _UNKNOWN for piece in pieces) != 1,
    }
    for reason, is_so in found.items():
        if is_so:
            raise ValueError(f"{reason}, and only models as Llama 2's are converted")


def _make(pieces: list[Piece], bos: int) -> Tokenizer:
    vocab = {piece.text: i for i, piece in enumerate(pieces)}
    (unknown,) = (piece.text for piece in pieces if piece.kind == _UNKNOWN)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=_merges(pieces, vocab), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for piece in pieces:
        if piece.kind in (_UNKNOWN, _CONTROL):
            tokenizer.add_special_tokens([AddedToken(piece.text, special=True, normalized=False)])
    if 0 <= bos < len(pieces):
        start = pieces[bos].text
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", pair=f"{start} $A {start} $B", special_tokens=[(start, bos)]
        )
    return tokenizer


def _merges(pieces: list[Piece], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs that make each piece; the piece of the highest score first."""
    found = []
    for piece in sorted(pieces, key=lambda one: -one.score):
        if piece.kind == _NORMAL:
            splits = ((piece.text[:i], piece.text[i:]) for i in range(1, len(piece.text)))
            found += [(left, right) for left, right in splits if left in vocab and right in vocab]
    return found


# ---- protocol buffers ------------------------------------------------------------------------------------------------


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    text, score = fields.get(1, b""), fields.get(2, b"\0\0\0\0")
    if not isinstance(text, bytes) or not isinstance(score, bytes):
        raise struct.error("a piece has fields of other types")
    return Piece(text.decode(), struct.unpack("<f", score)[0], int(fields.get(3, 1)))


def _message(message: list[tuple[int, Field]], number: int) -> dict[int, Field]:
    inner = [value for own, value in message if own == number and isinstance(value, bytes)]
    return dict(_fields(b"".join(inner)))


def _fields(data: bytes) -> Iterator[tuple[int, Field]]:
    """The numbers and the values of a message's fields: whole numbers, or bytes for all other types."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        if kind not in (1, 2, 5):
            raise struct.error(f"a field of type {kind}")
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        if position + size > len(data):
            raise IndexError("a field ends behind the file")
        yield number, data[position : position + size]
        position += size
