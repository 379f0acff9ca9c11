"""Token ids to text, piece by piece, and the byte-level tokenizer of the default checkpoint.

The pieces of a stream, joined, are exactly `tokenizer.decode` of all its ids, cut at the first stop string.
`tokenizers.decoders.DecodeStream` does not guarantee that:

- It has no end of stream, so it loses an incomplete character.
- It holds back text that ends in U+FFFD, which a model may write forever.
- With byte fallback it emits characters that later bytes turn into U+FFFD.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from .arguments import stop_strings

_REPLACEMENT = "\ufffd"
# Tokens kept as left context (a decoder may treat the first token apart), and how many trigger forgetting the rest.
_CONTEXT = 16
_WINDOW = 48


class TextStream:
    """Decodes one stream of token ids incrementally and ends it at the first stop string.

    stop: strings that end the text; the one that begins earliest wins and is not part of the text. The work per token
    is bounded whatever the length of the stream. Raises ValueError for a stop string that is empty or no text.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: str | Iterable[str] | None = (), skip_special_tokens: bool = True
    ) -> None:
        self._decoder = _IncrementalDecoder(tokenizer, skip_special_tokens)
        self._stop = _StopScanner(stop_strings(stop))
        self._flushed = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text; from then on nothing is emitted."""
        return self._stop.stopped

    def push(self, token_id: int) -> str:
        """Adds one token and returns the text that no later token can change, possibly none.

        Ids that the tokenizer does not know decode to nothing, as in `tokenizer.decode`. Raises ValueError for negative
        ids, RuntimeError after `flush`.
        """
        if self._flushed:
            raise RuntimeError("push after flush: this stream has ended; make a new TextStream for the next text")
        if self.stopped:
            return ""
        return self._stop.push(self._decoder.push(token_id))

    def flush(self) -> str:
        """Ends the stream and returns the text still held back; an incomplete character becomes U+FFFD."""
        if self._flushed or self.stopped:
            self._flushed = True
            return ""
        self._flushed = True
        return self._stop.push(self._decoder.flush()) + self._stop.flush()


class _IncrementalDecoder:
    """Emits `tokenizer.decode` of all ids pushed, as soon as each part is certain, from a bounded window of ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        added = tokenizer.get_added_tokens_decoder()
        self._skipped = {i for i, token in added.items() if token.special} if skip_special_tokens else set()
        self._byte_fallback = _has_byte_fallback(tokenizer)
        self._window: list[int] = []
        self._emitted = 0  # characters of the window's text that are out already

    def push(self, token_id: int) -> str:
        token_id = operator.index(token_id)
        if token_id < 0:
            raise ValueError(f"token id is {token_id}, expected >= 0; do not push padding or ignored labels")
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._skipped:
            return ""
        self._window.append(token_id)
        if self._byte_fallback and _is_byte_token(token):
            return ""  # one bad byte turns its whole run of bytes into U+FFFD, the good ones before it too
        text = self._decode(self._window)
        # At most the last character is open: decoding replaces every incomplete sequence by one U+FFFD.
        certain = len(text) - text.endswith(_REPLACEMENT)
        piece = text[self._emitted : certain]
        self._emitted = max(self._emitted, certain)
        if len(self._window) > _WINDOW:
            self._shorten_window(len(text) - self._emitted)
        return piece

    def flush(self) -> str:
        piece = self._decode(self._window)[self._emitted :]
        self._window, self._emitted = [], 0
        return piece

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special)

    def _shorten_window(self, pending: int) -> None:
        # A cut inside a character misreads its remaining bytes, at most three. The context is longer than that, so its
        # text ends as the whole text does, and counting from that end finds the place.
        self._window = self._window[-_CONTEXT:]
        self._emitted = len(self._decode(self._window)) - pending


class _StopScanner:
    """Passes text through up to the first stop string; holds back what may be the beginning of one."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        if not text:
            return ""
        self._held += text
        match = self._first_match()
        opening = self._first_opening()
        if match <= opening and match < len(self._held):  # one that began earlier would win, even if completed later
            return self._stop_at(match)
        piece, self._held = self._held[:opening], self._held[opening:]
        return piece

    def flush(self) -> str:
        return self._stop_at(self._first_match())

    def _stop_at(self, position: int) -> str:
        self.stopped = self.stopped or position < len(self._held)
        piece, self._held = self._held[:position], ""
        return piece

    def _first_match(self) -> int:
        found = [self._held.find(stop) for stop in self._stop]
        return min((position for position in found if position >= 0), default=len(self._held))

    def _first_opening(self) -> int:
        """Where the text ends in the beginning of a stop string; its length if nowhere."""
        length = len(self._held)
        for start in range(max(0, length - self._longest + 1), length):
            tail = self._held[start:]
            if any(stop.startswith(tail) for stop in self._stop):
                return start
        return length


def byte_tokenizer(special_tokens: Sequence[str] = ("<|endoftext|>",)) -> Tokenizer:
    """A tokenizer whose ids 0 to 255 are the bytes of UTF-8 text; special tokens follow from 256 on, in order.

    Raises ValueError if a special token is empty, repeated, or one of the 256 symbols that stand for bytes.
    """
    symbols = byte_symbols()
    for token in special_tokens:
        if not token or token in symbols or list(special_tokens).count(token) > 1:
            raise ValueError(f"special token {token!r}: expected distinct names of two or more characters, rename it")
    tokenizer = Tokenizer(models.BPE(vocab={symbol: byte for byte, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    return tokenizer


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte: GPT-2's `bytes_to_unicode`, which `ByteLevel` has built in."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    replacements = iter(range(256, 512))
    return [chr(byte if byte in printable else next(replacements)) for byte in range(256)]


def _has_byte_fallback(tokenizer: Tokenizer) -> bool:
    return tokenizer.decoder is not None and b"ByteFallback" in tokenizer.decoder.__getstate__()


def _is_byte_token(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
