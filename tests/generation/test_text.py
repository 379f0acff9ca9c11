"""Streaming text against `tokenizer.decode` of all ids, cut at the first stop string."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from megalodon_export.generation.text import TextStream, byte_tokenizer

BYTES = byte_tokenizer(("<|endoftext|>", "<|pad|>"))


def byte_fallback_tokenizer() -> Tokenizer:
    """In the manner of SentencePiece: ids 0 to 255 are byte tokens, then pieces, one of which is U+FFFD itself."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["<unk>", "▁", "a", "b", "▁ab", "ab", "▁c", "é", "\ufffd"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return tokenizer


FALLBACK = byte_fallback_tokenizer()
TOKENIZERS = {"bytes": BYTES, "byte fallback": FALLBACK}


def cut(text: str, stop: list[str]) -> str:
    """The text before the first place where a stop string stands."""
    for position in range(len(text)):
        if any(text.startswith(s, position) for s in stop):
            return text[:position]
    return text


def certain(text: str, stop: list[str]) -> str:
    """The part of an unfinished text that no continuation can change."""
    text = text.removesuffix("\ufffd")
    for position in range(len(text)):
        rest = text[position:]
        if any(rest.startswith(s) or s.startswith(rest) for s in stop):
            return text[:position]
    return text


def stream(tokenizer: Tokenizer, ids: list[int], stop: list[str], skip: bool = True) -> tuple[str, TextStream]:
    text = TextStream(tokenizer, stop, skip)
    return "".join(map(text.push, ids)) + text.flush(), text


@st.composite
def streams(draw: st.DrawFn, tokenizer: Tokenizer) -> list[int]:
    """Ids in short repeated runs, so that whole and broken characters and stop strings occur, also in long streams."""
    any_id = st.integers(0, tokenizer.get_vocab_size() + 2)
    text = st.text("ab é€😀", min_size=1, max_size=4).map(lambda t: list(t.encode()))
    broken = st.lists(st.sampled_from([0x61, 0x80, 0xA9, 0xC3, 0xE2, 0x82, 0xF0, 0x9F, 0xFF]), min_size=1, max_size=6)
    pieces = draw(st.lists(text | broken | st.lists(any_id, min_size=1, max_size=3), min_size=1, max_size=4))
    order = draw(st.lists(st.sampled_from(pieces), max_size=draw(st.sampled_from([5, 20, 100]))))
    return [i for piece in order for i in piece]


stops = st.lists(st.text("ab é\ufffd", min_size=1, max_size=4) | st.just("<|endoftext|>"), max_size=3)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=500)
@given(data=st.data(), stop=stops, skip=st.booleans())
def test_pieces_join_to_the_decoded_text_up_to_the_first_stop(name, data, stop, skip):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(streams(tokenizer))
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    text, end = stream(tokenizer, ids, stop, skip)
    assert text == cut(whole, stop)
    assert end.stopped == any(s in whole for s in stop)


@settings(deadline=None, max_examples=500)
@given(ids=streams(BYTES), stop=stops)
def test_every_piece_comes_as_soon_as_it_is_certain(ids, stop):
    text = TextStream(BYTES, stop)
    so_far = ""
    for count, token_id in enumerate(ids, start=1):
        so_far += text.push(token_id)
        if text.stopped:
            break
        assert so_far == certain(BYTES.decode(ids[:count]), stop)


def test_characters_come_whole():
    text = TextStream(BYTES)
    assert [text.push(byte) for byte in "aé€😀".encode()] == ["a", "", "é", "", "", "€", "", "", "", "😀"]
    assert text.flush() == ""


def test_bytes_that_are_no_text_become_replacement_characters():
    text = TextStream(BYTES)
    assert [text.push(byte) for byte in b"\xffa\x80\x80\xe2\x82"] == ["", "\ufffda", "", "\ufffd", "\ufffd", ""]
    assert text.flush() == "\ufffd"


def test_a_bad_byte_spoils_its_run_under_byte_fallback():
    ids = [0xC3, 0xA9, 0xFF, FALLBACK.token_to_id("▁ab")]
    text = TextStream(FALLBACK)
    assert [text.push(i) for i in ids] == ["", "", "", "\ufffd\ufffd\ufffd ab"]


def test_the_leading_space_is_only_the_first_tokens():
    word = FALLBACK.token_to_id("▁ab")
    text = TextStream(FALLBACK)
    assert [text.push(word) for _ in range(200)] == ["ab"] + [" ab"] * 199
    end = FALLBACK.token_to_id("</s>")
    assert [text.push(end) for _ in range(200)] == [""] * 200
    assert text.push(word) == " ab"


def test_stop_strings_span_tokens_and_end_the_text():
    text = TextStream(BYTES, stop=["\n\n", "END"])
    assert [text.push(byte) for byte in b"a\nE\n\nb"] == ["a", "", "\n", "E", "", ""]
    assert text.stopped
    assert text.push(ord("c")) == ""
    assert text.flush() == ""


def test_a_beginning_that_is_not_continued_comes_out():
    text = TextStream(BYTES, stop=["aab"])
    assert [text.push(byte) for byte in b"aaac"] == ["", "", "a", "aac"]
    assert [text.push(byte) for byte in b"aa"] == ["", ""]
    assert text.flush() == "aa"
    assert not text.stopped


def test_the_stop_string_that_begins_first_wins_though_another_is_complete_earlier():
    assert stream(BYTES, list(b"xabcd"), ["bc", "abcd"])[0] == "x"
    text, end = stream(BYTES, list(b"xabc"), ["bc", "abcd"])
    assert text == "xa"
    assert end.stopped
    text, end = stream(BYTES, list(b"xabce"), ["bc", "abcd"])
    assert text == "xa"
    assert end.stopped


def test_the_shorter_of_two_stop_strings_ends_the_text_at_once():
    text = TextStream(BYTES, stop=["abc", "ab"])
    assert [text.push(byte) for byte in b"xab"] == ["x", "", ""]
    assert text.stopped


def test_special_tokens_are_skipped_or_shown():
    end = BYTES.token_to_id("<|endoftext|>")
    assert stream(BYTES, [97, end, 98], [])[0] == "ab"
    assert stream(BYTES, [97, end, 98], [], skip=False)[0] == "a<|endoftext|>b"
    assert stream(BYTES, [97, end, 98], ["<|endoftext|>"], skip=False)[0] == "a"


class CountingTokenizer:
    """A tokenizer that remembers the longest sequence it had to decode."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.longest = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        self.longest = max(self.longest, len(ids))
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("unit", [b"a", b"\x80", b"\xf0\x9f\x98\x80", b"\xe2\x82", "€a".encode(), b"\xe2\x82\xff"])
def test_the_work_per_token_does_not_grow_with_the_stream(unit):
    tokenizer = CountingTokenizer(BYTES)
    ids = list(unit) * 500
    assert stream(tokenizer, ids, ["stop"])[0] == BYTES.decode(ids)
    assert tokenizer.longest < 100


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="empty stop string"):
        TextStream(BYTES, stop=["a", ""])
    text = TextStream(BYTES, stop="b")
    with pytest.raises(ValueError, match="token id is -100"):
        text.push(-100)
    assert text.push(97) + text.flush() == "a"
    assert text.flush() == ""
    with pytest.raises(RuntimeError, match="push after flush"):
        text.push(97)


@settings(deadline=None)
@given(st.text())
def test_the_byte_tokenizer_encodes_utf8(text):
    tokenizer = byte_tokenizer(())
    encoded = tokenizer.encode(text).ids
    assert encoded == list(text.encode())
    assert tokenizer.decode(encoded) == text


def test_the_byte_tokenizers_ids_are_bytes_then_special_tokens(tmp_path):
    assert BYTES.encode("é").ids == [0xC3, 0xA9]
    assert BYTES.get_vocab_size() == 258
    assert [BYTES.token_to_id(token) for token in ("<|endoftext|>", "<|pad|>")] == [256, 257]
    assert BYTES.encode("a<|pad|>").ids == [97, 257]
    BYTES.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert loaded.encode("é b\n<|endoftext|>").ids == [*"é b\n".encode(), 256]
    assert byte_tokenizer(()).get_vocab_size() == 256


@pytest.mark.parametrize("special", ["", "a", "Ġ"])
def test_special_tokens_that_would_hide_a_byte_are_refused(special):
    with pytest.raises(ValueError, match="special token"):
        byte_tokenizer([special])
    with pytest.raises(ValueError, match="<x>"):
        byte_tokenizer(["<x>", "<x>"])
